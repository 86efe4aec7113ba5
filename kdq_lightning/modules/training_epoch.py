"""The sums of a training epoch, and its line: mean losses, images a second, and whether a loss was not finite."""

import time
from collections.abc import Mapping

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

LINE = 80  # columns of the line that an epoch prints


class TrainingEpoch:
    """Sums over the images of an epoch, on the device: looking at a tensor makes the host wait."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock."""
        self._sums: dict[str, Tensor] = {}
        self._bad_step = torch.tensor(-1, device=device)
        self._started = self._stopped = time.perf_counter()

    @property
    def names(self) -> list[str]:
        """Names of what `means` returns, in its order."""
        return [*self._sums, *(["images_per_second"] if self._sums else [])]

    def stop_clock(self) -> None:
        """Stop the clock, because what follows is no training."""
        self._stopped = time.perf_counter()

    def resume_clock(self) -> None:
        """Start the clock again."""
        self._started += time.perf_counter() - self._stopped

    def add(self, means: Mapping[str, Tensor], images: int, step: int) -> None:
        """Add a batch.

        Args:
            means: Scalars, each a mean over the batch; `loss` is watched.
            images: In the batch.
            step: That trains on it.
        """
        for name, mean in means.items():
            weighted = torch.stack([mean, torch.ones_like(mean)]) * images
            self._sums[name] = self._sums.get(name, 0) + weighted
        bad = (self._bad_step < 0) & ~means["loss"].isfinite()
        self._bad_step = torch.where(bad, step, self._bad_step)

    def bad_step(self, strategy: Strategy) -> int:
        """Return the first step whose loss was not finite on any rank, -1 if there was none."""
        step = torch.where(self._bad_step < 0, torch.inf, self._bad_step.double())
        first = float(strategy.reduce(step, reduce_op="min"))
        return -1 if first == torch.inf else int(first)

    def means(self, strategy: Strategy) -> dict[str, float]:
        """Return the means over the images of all ranks and `images_per_second`; nothing if there was no step."""
        if not self._sums:
            return {}
        seconds = time.perf_counter() - self._started
        totals = strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
        means = (totals[:, 0] / totals[:, 1]).tolist()
        return dict(zip(self._sums, means, strict=True)) | {"images_per_second": float(totals[0, 1]) / seconds}


def epoch_line(epoch: int, epochs: int | None, metrics: Mapping[str, float]) -> str:
    """Return what is printed of an epoch, such as "epoch 3/16  train 97.7 %, loss 0.43  val 98.6 %, loss 0.12".

    Args:
        epoch: Number of the epoch, from 1.
        epochs: Number of epochs; None or -1 if nothing limits them.
        metrics: Values by tag. The last ones are left out where the line has no room for them.
    """
    line = f"epoch {epoch}/{epochs}" if epochs and epochs > 0 else f"epoch {epoch}"
    for tag, text in (
        ("train/top1", "  train {:.1f} %"),
        ("train/loss", ", loss {:.3g}" if "train/top1" in metrics else "  train loss {:.3g}"),
        ("val/top1", "  val {:.1f} %"),
        ("val/agreement", ", {:.1f} % as teacher"),
        ("val/loss", ", loss {:.3g}"),
        ("train/images_per_second", "  {:,.0f} images/s"),
    ):
        part = text.format(metrics[tag]) if tag in metrics else ""
        line += part if len(line + part) <= LINE else ""
    return line
