"""FitNets: the first half of the student learns the teacher's features (hints), then the whole learns its answers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import check_range
from kdq_lightning.losses import hint_loss
from kdq_lightning.modules.classifier import Classifier, Losses
from kdq_lightning.modules.schedule import Cycle, one_cycle
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import check_hint_layer, features_at, parameters_before


class HintKD(VanillaKD):
    """Trains in two stages (Romero et al. 2015, section 2.2).

    Stage 1: ½·mean (r(F_S) - F_T)², F the features of both networks' hint layers, averaged to the smaller of their
    sizes, r a 1x1 convolution with bias; the student up to there and r are trained. Stage 2: vanilla distillation, the
    optimizer's momentum and the learning rate's cycle started afresh. r is no part of the exported student.
    """

    def __init__(
        self,
        hint_share: float = 0.2,
        strategy: str = "hint",
        hint_layer: str | None = None,
        teacher_hint_layer: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Set the length of stage 1.

        Args:
            hint_share: Share of the training steps that stage 1 takes, between 0 and 1.
            strategy: What records call this run.
            hint_layer: The student's layer that learns, such as `features.6`; the project's own networks have a
                default, their second stage.
            teacher_hint_layer: The teacher's layer that is learnt from; likewise.
            **kwargs: Those of `VanillaKD`.
        """
        super().__init__(strategy=strategy, **kwargs)
        check_range("hint_share", hint_share, low=0, high=0.99)
        self.hint_share = hint_share
        self.hint_layer, self.teacher_hint_layer = hint_layer, teacher_hint_layer
        self.hint_steps = 0
        self.regressor: nn.Conv2d | None = None
        self._resting: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []  # in stage 1 and in stage 2

    @classmethod
    def for_timing(cls, options: Mapping[str, Any], teacher: Teacher | None, is_cached: bool) -> Classifier:
        """Build the module so that stage 2 asks the teacher, too: its steps then cost no less than stage 1's."""
        return super().for_timing(options, teacher, is_cached=False)

    def setup(self, stage: str) -> None:
        """Build r; its channels are those of the two networks' features.

        Raises:
            UserError: If a network has no layer of that name, or its features are no images.
        """
        super().setup(stage)
        if self.teacher is not None and self.regressor is None:
            probe = torch.zeros(1, *self.trainer.datamodule.image_shape)  # type: ignore[attr-defined]
            width = _channels(self.network, self._layer, probe)
            wanted = _channels(self.teacher.network, self._teachers_layer, probe)
            self.regressor = nn.Conv2d(width, wanted, kernel_size=1)

    @property
    def _layer(self) -> str:
        return check_hint_layer(self.network_name, self.network, self.hint_layer, "hint_layer")

    @property
    def _teachers_layer(self) -> str:
        assert self.teacher is not None, "set by setup('fit')"
        return check_hint_layer(self.teacher.name, self.teacher.network, self.teacher_hint_layer, "teacher_hint_layer")

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
        half, rest = self._halves()
        self._resting = list(rest), list(self.regressor.parameters())
        return [
            ([half], lambda step: first(step) + second(step)),
            ([rest], second),
            ([self.regressor], first),
        ]

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - one of Lightning's forms
        """Return the optimizer; one that the user gives has no stages in its learning rate, so they are set here."""
        if self.given_optimizer is not None:
            self.cycles(self._total_steps(), self.warmup)
        return super().configure_optimizers()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep an optimizer that the user gives from moving what the stage leaves alone: it knows no stages."""
        if self.given_optimizer is not None:
            for parameter in self._resting[self.global_step >= self.hint_steps]:
                parameter.grad = None

    def _halves(self) -> tuple[nn.ParameterList, nn.ParameterList]:
        """Return the parameters that the hint layer's features depend on, which stage 1 trains, and the others."""
        probe = torch.zeros(1, *self.trainer.datamodule.image_shape).to(self.regressor.weight)  # type: ignore
        before = parameters_before(self.network, self._layer, probe)
        halves = nn.ParameterList(), nn.ParameterList()
        for name, parameter in self.network.named_parameters():
            halves[name not in before].append(parameter)
        return halves

    def on_train_batch_start(self, batch: View, batch_idx: int) -> None:
        """Drop the optimizer's momentum when stage 2 begins."""
        if self.global_step == self.hint_steps:
            self.trainer.optimizers[0].state.clear()

    def losses(self, view: View) -> Losses:
        """Return the hint loss in stage 1, the vanilla loss in stage 2."""
        assert self.teacher is not None and self.regressor is not None, "set by setup('fit')"
        if self.global_step >= self.hint_steps:
            losses = super().losses(view)
            return losses._replace(loss=losses.loss + self._zero(self.regressor))
        features = features_at(self.network, self._layer, self.normalized(view.resized))
        wanted = self.teacher.features(view.images, self._teachers_layer)
        side = (min(features.shape[2], wanted.shape[2]), min(features.shape[3], wanted.shape[3]))
        features = F.adaptive_avg_pool2d(features, side) if features.shape[-2:] != side else features
        hint = hint_loss(self.regressor(features), F.adaptive_avg_pool2d(wanted, side))
        return Losses(hint + self._zero(self.network), {"hint": hint}, None)

    def _zero(self, partly_unused: nn.Module) -> Tensor | float:
        """Return 0 that depends on every parameter of a module: DDP waits for the gradient of each."""
        if self.trainer.world_size == 1:
            return 0.0
        return sum(
            (0 * parameter.sum() for parameter in partly_unused.parameters()), torch.zeros((), device=self.device)
        )


@torch.no_grad()
def _channels(network: nn.Module, layer: str, images: Tensor) -> int:
    """Return the channels of the features that a layer gives; the network stays as it is."""
    was_training = [module.training for module in network.modules()]
    try:
        return features_at(network.eval(), layer, images).shape[1]
    finally:
        for module, training in zip(network.modules(), was_training, strict=True):
            module.training = training
