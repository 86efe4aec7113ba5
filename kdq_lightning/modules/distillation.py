"""The base of every strategy with a teacher: it loads and freezes the teacher, and keeps it out of checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from kdq_lightning.data.augmentation import View
from kdq_lightning.data.images import Batch
from kdq_lightning.data.normalization import Channels
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.logit_cache import KnownLogits, LogitCache
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.trained_network import Description

_TEACHER_FLAGS = (
    "--model.init_args.teacher_network",
    "--model.init_args.teacher_mean",
    "--model.init_args.teacher_std",
)


class Distillation(Classifier):
    """A student beside a frozen teacher; a strategy overrides `losses`, which asks `cached_teacher_logits`."""

    def __init__(
        self,
        teacher: str,
        teacher_network: str | None = None,
        teacher_mean: Channels | None = None,
        teacher_std: Channels | None = None,
        teacher_cache: str | None = None,
        teacher_network_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Name the teacher; it is loaded when training starts.

        Args:
            teacher: A run folder (its newest finished version's best checkpoint), a checkpoint of ours, a packed file,
                or a plain state dict. Of a run with several peers, the first one.
            teacher_network: The teacher's network, which a plain state dict doesn't say.
            teacher_mean: Channel means of the inputs that a plain state dict was trained on.
            teacher_std: Their channel deviations.
            teacher_cache: Folder for the teacher's logits on all training views, 2 or 4 bytes a class, image and epoch.
                Runs that see the same views (vanilla, dkd, hint, recover of one seed) find them there, and ask the
                teacher for one batch an epoch, to compare.
            teacher_network_args: Further arguments of the teacher's network, which a plain state dict doesn't say.
            **kwargs: Those of `Classifier`.
        """
        super().__init__(**kwargs)
        self.teacher_source = teacher
        self.teacher_description = Description(
            teacher_network, teacher_mean, teacher_std, _TEACHER_FLAGS, teacher_network_args
        )
        self.teacher: Teacher | None = None
        self.teacher_cache = teacher_cache
        self._cache: LogitCache | None = None
        self.agreement = MeanMetric()
        self._teacher_top1: dict[int, Tensor] = {}

    @classmethod
    def for_timing(cls, options: Mapping[str, Any], teacher: Teacher | None, is_cached: bool) -> Classifier:
        """Build the student beside the given teacher, with logits at no cost where they are on disk already."""
        given = {name: value for name, value in options.items() if name not in ("weights", "teacher_cache")}
        module = cls(**given | {"teacher": "in memory"})
        module.teacher = teacher
        module._cache = KnownLogits(module.num_classes) if is_cached else None
        return module

    def setup(self, stage: str) -> None:
        """Load the teacher, if the module is trained."""
        super().setup(stage)
        if stage == "fit" and self.teacher is None:
            self.teacher = self._load_teacher()

    def _load_teacher(self) -> Teacher:
        trained = next(iter(load_trained(self.teacher_source, self.teacher_description).values()))
        wanted = self.teacher_description.network
        if wanted not in (None, trained.network):
            raise UserError(f"the teacher in {trained.path} is a {trained.network}, not a {wanted}")
        if trained.num_classes != self.num_classes:
            raise UserError(
                f"the teacher in {trained.path} has {trained.num_classes} classes, the data {self.num_classes}:"
                " give --model.init_args.teacher a network trained on this data"
            )
        trained = self.for_data(trained, role="the teacher ")
        return Teacher(trained.build(), trained.statistics, trained.network, [str(trained.path), trained.origin()])

    def find_teacher(self) -> Teacher | None:
        """Return the teacher; None if it isn't there any more, as a student outlives its teacher's file."""
        try:
            return self.teacher or self._load_teacher()
        except UserError:
            return None

    def on_fit_start(self) -> None:
        """Move the teacher to the student's device, and open the cache of its logits."""
        if self.teacher is not None:
            self.teacher.network.to(self.device)
        if self.teacher is not None and self.teacher_cache is not None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            key = {"teacher": self.teacher.digest, "statistics": list(self.teacher.statistics)}
            key["precision"] = str(self.trainer.precision)
            self._cache = LogitCache(self.teacher_cache, key | data.view_key())

    def on_train_epoch_start(self) -> None:
        """Read the epoch's logits from the cache; if one process has none, all processes ask the teacher."""
        super().on_train_epoch_start()
        if self._cache is not None:
            known = self._cache.start(self.current_epoch, self._images_of_an_epoch, self.device)
            if not self.trainer.strategy.reduce_boolean_decision(known):
                self._cache.disable()

    def on_train_epoch_end(self) -> None:
        """Write the epoch's logits into the cache, if the teacher was asked for all of them."""
        super().on_train_epoch_end()
        if self._cache is None or not self._cache.pending:
            return
        asked = [torch.cat(column) for column in zip(*self._cache.pending, strict=True)]
        gathered = [torch.as_tensor(self.all_gather(column)) for column in asked]
        index, logits = gathered[0].flatten(), gathered[1].reshape(-1, self.num_classes)
        if self.trainer.is_global_zero and len(index) == self._images_of_an_epoch:
            try:
                self._cache.write(self.current_epoch, index, logits)
            except UserError as error:  # a full disk: the run can do without
                self.print(f"the teacher's answers are not kept: {error}", flush=True)

    @property
    def _images_of_an_epoch(self) -> int:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        batch_size: int = min(data.batch_size, len(data.train_index))
        return int(self.trainer.num_training_batches) * batch_size

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the digest of the teacher's weights into the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another teacher.

        Raises:
            UserError: If its file has changed.
        """
        super().on_load_checkpoint(checkpoint)
        if self.teacher is not None and checkpoint.get("teacher", self.teacher.digest) != self.teacher.digest:
            raise UserError(
                f"the teacher in {self.teacher_source} has other weights than the one that this run began with: put"
                " that one back, or start again without --ckpt_path"
            )

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (batch, classes) of images (batch, channels, h, w) in [0, 1]."""
        assert self.teacher is not None, "set by setup('fit')"
        return self.teacher.logits(images)

    def cached_teacher_logits(self, view: View) -> Tensor:
        """Return the teacher's logits (batch, classes) of a view as the datamodule gave it, from the cache if it can.

        Args:
            view: The training batch; changed images, such as mixed ones, are not in the cache.
        """
        if self._cache is None:
            return self.teacher_logits(view.images)
        return self._cache.logits(view.index, lambda: self.teacher_logits(view.images))

    def _evaluate(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add the agreement with the teacher, whose answers on the validation images are computed once."""
        logits = super()._evaluate(batch, batch_idx)
        if self.teacher is not None and self.fitting:
            if batch_idx not in self._teacher_top1:
                self._teacher_top1[batch_idx] = self.teacher_logits(batch.images).argmax(1)
            same = [values.argmax(1) == self._teacher_top1[batch_idx] for values in logits.values()]
            self.agreement.update(torch.stack(same).float())
        return logits

    def logged_names(self) -> list[str]:
        """Return what `fit` logs in every epoch, the agreement with the teacher included."""
        return [*super().logged_names(), *(["val/agreement"] if self.teacher is not None else [])]

    def on_validation_epoch_end(self) -> None:
        """Log the scores, and the share of images that student and teacher give the same class, in percent."""
        super().on_validation_epoch_end()
        if self.teacher is not None:
            self.log("val/agreement", 100 * self.agreement.compute())
            self.agreement.reset()
