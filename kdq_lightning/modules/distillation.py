"""The base of every strategy with a teacher: loads it, freezes it, and keeps it out of the student's checkpoint."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from kdq_lightning.checkpoints import load_trained
from kdq_lightning.data.images import Batch
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.teacher import Teacher


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
            self.teacher = self._load_teacher()

    def _load_teacher(self) -> Teacher:
        trained = next(iter(load_trained(*self.teacher_source, option="teacher").values()))
        if self.teacher_source[1] not in (None, trained.network):
            raise UserError(f"the teacher in {trained.path} is a {trained.network}, not a {self.teacher_source[1]}")
        if trained.num_classes != self.num_classes:
            raise UserError(
                f"the teacher in {trained.path} has {trained.num_classes} classes, the data {self.num_classes}:"
                " give --model.init_args.teacher a network trained on this data"
            )
        return Teacher(trained.build(), trained.mean, trained.std)

    def find_teacher(self) -> Teacher | None:
        """Return the teacher; None if it isn't there any more, as a student outlives its teacher's file."""
        try:
            return self.teacher or self._load_teacher()
        except UserError:
            return None

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device."""
        super().on_fit_start()
        if self.teacher is not None:
            self.teacher.network.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down which weights have taught."""
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another teacher.

        Raises:
            UserError: If its file has changed.
        """
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None and checkpoint.get("teacher", self.teacher.digest) != self.teacher.digest:
            raise UserError(
                f"the teacher in {self.teacher_source[0]} has other weights than the one that this run began with: put"
                " that one back, or start again without --ckpt_path"
            )

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
