"""What validation and test measure while they run: accuracy and calibration of every network, and the loss."""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from kdq_lightning.evaluation import build_metrics


class Scores(nn.Module):
    """Sums over the images of a split; a module, so that they move to the device with the one that holds them."""

    def __init__(self, names: Iterable[str], num_classes: int) -> None:
        """Name the networks and the width of their last layer."""
        super().__init__()
        self.networks = nn.ModuleDict({name: build_metrics(num_classes) for name in names})
        self.loss = MeanMetric()

    def update(self, logits: Mapping[str, Tensor], labels: Tensor) -> None:
        """Add a batch, which may be empty: a rank's last one.

        Args:
            logits: float32, (batch, classes), by network.
            labels: (batch,), class indices.
        """
        if not len(labels):
            return
        for name, values in logits.items():
            metrics: MetricCollection = self.networks[name]  # type: ignore[assignment]
            metrics.update(values.double().softmax(1), labels)
            self.loss.update(F.cross_entropy(values, labels), weight=len(labels))

    def compute_and_reset(self) -> dict[str, Tensor]:
        """Return what all ranks have found, and start afresh.

        Returns:
            `top1`, `top5` and `ece` in percent and `loss`, means over the networks; of several also each one's
            `top1/<name>` and so on.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, metrics in self.networks.items():
            assert isinstance(metrics, MetricCollection)
            found[name] = {key: 100 * value for key, value in metrics.compute().items()}
            metrics.reset()
        means = {
            key: torch.stack([values[key] for values in found.values()]).mean() for key in next(iter(found.values()))
        }
        if len(found) > 1:
            means |= {f"{key}/{name}": value for name, values in found.items() for key, value in values.items()}
        means["loss"] = self.loss.compute()
        self.loss.reset()
        return means
