"""Base class of every module: validation, test and prediction. Training is in trained.py."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kdq_lightning.data.images import Batch
from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.modules.scores import Scores


class EvaluatedModule(LightningModule):
    """Networks that are validated, tested and asked for predictions; a subclass builds and trains them.

    Attributes:
        statistics: Those of the inputs that the networks expect; None before `setup`.
        scores: What validation and test count.
        validation_scores: What the last validation gave, if the weights are still those; otherwise nothing.
    """

    statistics: Statistics | None = None
    scores: Scores
    validation_scores: Mapping[str, float]

    def networks(self) -> dict[str, nn.Module]:
        """Return the trained networks by the names that records, packed files and dashboards use."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, h, w) in [0, 1]; of peers, the first one's."""
        logits: Tensor = next(iter(self.networks().values()))(self.normalized(images))
        return logits

    def normalized(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] as inputs of the networks: normalised, and in the memory format of convolutions.

        Args:
            images: (batch, channels, h, w).
        """
        assert self.statistics is not None, "setup or a checkpoint gives the statistics"
        inputs = normalize(images, self.statistics).to(self.dtype)  # which the Trainer's precision may have changed
        return inputs.contiguous(memory_format=torch.channels_last)

    @property
    def fitting(self) -> bool:
        """Whether `Trainer.fit` is running, its validation included."""
        return self.trainer.state.fn == TrainerFn.FITTING

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch; in the training precision while training, otherwise in float32."""
        with nullcontext() if self.fitting else torch.autocast(self.device.type, enabled=False):
            self._evaluate(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate a batch in float32."""
        self.validation_step(batch, batch_idx)

    def _evaluate(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the scores, and return each network's logits (batch, classes)."""
        images = self.normalized(batch.images)
        logits = {name: network(images).float() for name, network in self.networks().items()}
        self.scores.update(logits, batch.labels, batch.index)
        return logits

    def logged_names(self) -> list[str]:
        """Return what `fit` logs in every epoch, except for the parts of a loss; what matters most comes first."""
        return [f"val/{key}" for key in self.scores.logged_names()]

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the validation images; accuracies in percent."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the test images; accuracies in percent."""
        self._log_scores("test")

    def _log_scores(self, split: str) -> None:
        scores = self.scores.compute_and_reset()
        if split == "val":
            self.validation_scores = scores
        logs = {f"{split}/{key}": value for key, value in scores.items()}
        self.log_dict(logs | ({"step": float(self.global_step)} if self.fitting else {}))

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image indices, top-1 classes and their probabilities, each (batch,), in float32."""
        with torch.autocast(self.device.type, enabled=False):
            probability, top1 = self(batch.images).float().softmax(1).max(1)
        return batch.index, top1, probability
