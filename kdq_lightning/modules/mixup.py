"""Mixup distillation (function matching): student and teacher see the same mixed images."""

from dataclasses import replace
from typing import Any

import numpy as np

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.losses import cross_entropy, kd_loss, mixup, partner
from kdq_lightning.modules.classifier import Losses
from kdq_lightning.modules.distillation import Distillation


class MixupKD(Distillation):
    """Matches the teacher's function between the images (Beyer et al. 2022, section 3, function matching).

    One λ ~ Beta(α, α) a step, x̃ = λx + (1 - λ)x_π for both networks, and
    a·[λ·CE(y) + (1 - λ)·CE(y_π)] + (1 - a)·τ²·KL(f_T(x̃) ‖ f_S(x̃)).
    """

    def __init__(
        self,
        label_weight: float = 0.0,
        temperature: float = 1.0,
        mixup_alpha: float = 1.0,
        strategy: str = "mixup",
        **kwargs: Any,
    ) -> None:
        """Set the weight of the labels, the temperature and the distribution of λ.

        Args:
            label_weight: Weight a of the mixed cross-entropy, in [0, 1]; the teacher has 1 - a.
            temperature: τ > 0 that softens both networks.
            mixup_alpha: α > 0 of the Beta distribution that λ is drawn from.
            strategy: What records call this run.
            **kwargs: Those of `Distillation`.

        Raises:
            UserError: If a number is out of range, or `teacher_cache` is given.
        """
        super().__init__(strategy=strategy, **kwargs)
        if self.teacher_cache is not None:
            raise UserError("teacher_cache keeps answers to views, and mixed images are none: leave it out")
        check_range("label_weight", label_weight, low=0, high=1, including_low=True)
        check_range("temperature", temperature, low=0)
        check_range("mixup_alpha", mixup_alpha, low=0, high=1e6)
        self.label_weight, self.temperature, self.mixup_alpha = label_weight, temperature, mixup_alpha

    def draw_lambda(self) -> float:
        """Return λ, which depends on seed, epoch and step alone: it is the same on every rank and after resuming."""
        key = [self.trainer.datamodule.seed, self.current_epoch, self.global_step]  # type: ignore[attr-defined]
        return float(np.random.default_rng(key).beta(self.mixup_alpha, self.mixup_alpha))

    def losses(self, view: View) -> Losses:
        """Return the loss on mixed images, which both networks see."""
        lam = self.draw_lambda()
        mixed = replace(view, images=mixup(view.images, lam))
        logits = self(mixed.resized)
        ce = lam * cross_entropy(logits, view.labels) + (1 - lam) * cross_entropy(logits, partner(view.labels))
        kd = kd_loss(logits, self.teacher_logits(mixed.images), self.temperature)
        return Losses(self.label_weight * ce + (1 - self.label_weight) * kd, {"ce": ce, "kd": kd}, logits)
