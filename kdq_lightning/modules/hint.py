"""FitNets: the first half of the student learns the teacher's features (hints), then the whole learns its answers."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.losses import hint_loss
from kdq_lightning.modules.classifier import Classifier, Losses
from kdq_lightning.modules.schedule import Cycle, one_cycle
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import hint_features, hint_modules


class HintKD(VanillaKD):
    """Trains in two stages (Romero et al. 2015, section 2.2).

    Stage 1: ½·mean (r(F_S) - F_T)², F the features of both networks' hint layer (the second stage), r a 1x1
    convolution with bias; the student up to there and r are trained. Stage 2: vanilla distillation, the optimizer's
    momentum and the learning rate's cycle started afresh. r is no part of the exported student.
    """

    def __init__(self, hint_share: float = 0.2, strategy: str = "hint", **kwargs: Any) -> None:
        """Set the length of stage 1.

        Args:
            hint_share: Share of the training steps that stage 1 takes, between 0 and 1.
            strategy: What records call this run.
            **kwargs: Those of `VanillaKD`.
        """
        super().__init__(strategy=strategy, **kwargs)
        check_range("hint_share", hint_share, low=0, high=0.99)
        self.hint_share = hint_share
        self.hint_steps = 0
        self.regressor: nn.Conv2d | None = None

    @classmethod
    def for_timing(cls, options: Mapping[str, Any], teacher: Teacher | None, is_cached: bool) -> Classifier:
        """Build the module so that stage 2 asks the teacher, too: its steps then cost no less than stage 1's."""
        return super().for_timing(options, teacher, is_cached=False)

    def setup(self, stage: str) -> None:
        """Build r; its channels are those of the two networks' features."""
        super().setup(stage)
        if self.teacher is not None and self.regressor is None:
            probe = torch.zeros(1, *self.trainer.datamodule.image_shape)  # type: ignore[attr-defined]
            theirs = hint_modules(self.teacher.name, self.teacher.network)
            (width, *side), (wanted, *whole) = (_shape(part, probe) for part in (self._half(), theirs))
            if side != whole:
                raise UserError(
                    f"hints need features of one size, not {side} of the student and {whole} of the teacher"
                )
            self.regressor = nn.Conv2d(width, wanted, kernel_size=1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build r by its weights, so that the checkpoint loads without the teacher's file."""
        super().on_load_checkpoint(checkpoint)
        outputs, inputs = checkpoint["state_dict"]["regressor.weight"].shape[:2]
        self.regressor = nn.Conv2d(inputs, outputs, kernel_size=1)

    def cycles(self, total: int, warmup: float) -> list[tuple[list[nn.Module], Cycle]]:
        """Return the first half with both cycles, the rest with the second one and r with the first one."""
        self.hint_steps = min(max(round(self.hint_share * total), 1), total - 1)
        first = one_cycle(self.hint_steps, warmup)
        second = one_cycle(total - self.hint_steps, warmup, start=self.hint_steps)
        assert self.regressor is not None, "built in setup"
        return [
            (self._half(), lambda step: first(step) + second(step)),
            (self._rest(), second),
            ([self.regressor], first),
        ]

    def _half(self) -> list[nn.Module]:
        """Return the modules that stage 1 trains, in the order in which they run."""
        return hint_modules(self.network_name, self.network)

    def _rest(self) -> list[nn.Module]:
        half = self._half()
        return [child for child in self.network.children() if all(child is not module for module in half)]

    def on_train_batch_start(self, batch: View, batch_idx: int) -> None:
        """Drop the optimizer's momentum when stage 2 begins."""
        if self.global_step == self.hint_steps:
            self.trainer.optimizers[0].state.clear()

    def losses(self, view: View) -> Losses:
        """Return the hint loss in stage 1, the vanilla loss in stage 2."""
        assert self.teacher is not None and self.regressor is not None, "set by setup('fit')"
        if self.global_step >= self.hint_steps:
            losses = super().losses(view)
            return losses._replace(loss=losses.loss + self._zero([self.regressor]))
        features = self.regressor(hint_features(self._half(), self.normalized(view.resized)))
        wanted = F.adaptive_avg_pool2d(self.teacher.features(view.images), features.shape[-2:])
        hint = hint_loss(features, wanted)
        return Losses(hint + self._zero(self._rest()), {"hint": hint}, None)

    def _zero(self, unused: list[nn.Module]) -> Tensor | float:
        """Return 0 that depends on every parameter of the modules: DDP waits for the gradient of each."""
        if self.trainer.world_size == 1:
            return 0.0
        return sum((0 * parameter.sum() for module in unused for parameter in module.parameters()), torch.zeros(()))


@torch.no_grad()
def _shape(modules: list[nn.Module], images: Tensor) -> tuple[int, ...]:
    """Return the channels and the sides of the features (batch, channels, h', w') that modules in a row make."""
    copies = [copy.deepcopy(module).eval() for module in modules]  # which leaves BatchNorm's statistics alone
    return tuple(hint_features(copies, images).shape[1:])
