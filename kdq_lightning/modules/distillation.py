"""The base of every strategy with a teacher: loads it, freezes it, and keeps it out of the student's checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from kdq_lightning.checkpoints import load_trained
from kdq_lightning.data.images import Batch
from kdq_lightning.data.normalization import Statistics, renormalize
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.networks import stage2_features


class Teacher:
    """A frozen network: eval mode, no gradient, its own input statistics.

    It is no `nn.Module`, so that neither checkpoints nor DDP see its weights.
    """

    def __init__(self, network: nn.Module, mean: Statistics, std: Statistics) -> None:
        """Freeze the network."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def logits(self, images: Tensor, mean: Statistics, std: Statistics) -> Tensor:
        """Return logits (batch, classes) of images (batch, 3, h, w) that are normalised by the given statistics."""
        logits: Tensor = self.network(renormalize(images, mean, std, self.mean, self.std))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor, mean: Statistics, std: Statistics) -> Tensor:
        """Return the features after the second stage, (batch, channels, h', w'); see `logits`."""
        return stage2_features(self.network, renormalize(images, mean, std, self.mean, self.std))


class Distillation(Classifier):
    """A student beside a frozen teacher; a strategy overrides `losses` and calls `teacher_logits` in it."""

    def __init__(
        self,
        teacher: str,
        teacher_network: str | None = None,
        teacher_mean: Statistics | None = None,
        teacher_std: Statistics | None = None,
        **kwargs: Any,
    ) -> None:
        """Name the teacher; it is loaded when training starts.

        Args:
            teacher: A run folder (its newest finished version's best checkpoint), a checkpoint of ours, a packed file,
                or a plain `.safetensors` state dict. Of a run with several peers, the first one.
            teacher_network: The teacher's network, which a plain state dict doesn't say.
            teacher_mean: Channel means of the inputs that a plain state dict was trained on.
            teacher_std: Their channel deviations.
            **kwargs: Those of `Classifier`.
        """
        super().__init__(**kwargs)
        self.teacher_source = (teacher, teacher_network, teacher_mean, teacher_std)
        self.teacher: Teacher | None = None
        self.agreement = MeanMetric()
        self._teacher_top1: dict[int, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Load the teacher for training; nothing else needs it."""
        super().setup(stage)
        if stage == "fit" and self.teacher is None:
            trained = next(iter(load_trained(*self.teacher_source, option="teacher").values()))
            if self.teacher_source[1] not in (None, trained.network):
                raise UserError(f"the teacher in {trained.path} is a {trained.network}, not a {self.teacher_source[1]}")
            if trained.num_classes != self.num_classes:
                raise UserError(
                    f"the teacher in {trained.path} has {trained.num_classes} classes, the data {self.num_classes}:"
                    " give --model.init_args.teacher a network trained on this data"
                )
            self.teacher = Teacher(trained.build(), trained.mean, trained.std)

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device."""
        super().on_fit_start()
        if self.teacher is not None:
            self.teacher.network.to(self.device)

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (batch, classes) for the very images (batch, 3, h, w) that the student gets."""
        assert self.teacher is not None and self.mean is not None and self.std is not None, "set by setup('fit')"
        return self.teacher.logits(images, self.mean, self.std)

    def _evaluate(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add the agreement with the teacher, whose answers on the validation images are computed once."""
        logits = super()._evaluate(batch, batch_idx)
        if self.teacher is not None and self.fitting:
            if batch_idx not in self._teacher_top1:
                self._teacher_top1[batch_idx] = self.teacher_logits(self.inputs(batch.images)).argmax(1)
            same = [values.argmax(1) == self._teacher_top1[batch_idx] for values in logits.values()]
            self.agreement.update(torch.stack(same).float())
        return logits

    def on_validation_epoch_end(self) -> None:
        """Log the share of validation images on which student and teacher give the same class, in percent."""
        super().on_validation_epoch_end()
        if self.teacher is not None:
            self.log("val/agreement", 100 * self.agreement.compute())
            self.agreement.reset()
