"""Vanilla distillation: a·CE + (1 - a)·τ²·KL(p_T^τ ‖ p_S^τ)."""

from typing import Any

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import check_range
from kdq_lightning.losses import cross_entropy, kd_loss
from kdq_lightning.modules.classifier import Losses
from kdq_lightning.modules.distillation import Distillation


class VanillaKD(Distillation):
    """Learns the teacher's softened probabilities beside the labels (Hinton et al. 2015, sections 2 and 2.1).

    The loss is a·CE + (1 - a)·τ²·KL(p_T^τ ‖ p_S^τ), with p^τ = softmax(logits / τ).

    `temperature: inf` is logit matching (Bucila et al. 2006; Ba & Caruana 2014), best with `label_weight: 0`.
    """

    def __init__(
        self, label_weight: float = 0.1, temperature: float = 4.0, strategy: str = "vanilla", **kwargs: Any
    ) -> None:
        """Set the weight of the labels and the temperature.

        Args:
            label_weight: Weight a of the cross-entropy, in [0, 1]; the teacher has 1 - a.
            temperature: τ > 0 that softens both networks; `.inf` for logit matching.
            strategy: What records call this run.
            **kwargs: Those of `Distillation`.
        """
        super().__init__(strategy=strategy, **kwargs)
        check_range("label_weight", label_weight, low=0, high=1, including_low=True)
        check_range("temperature", temperature, low=0)
        self.label_weight, self.temperature = label_weight, temperature

    def losses(self, view: View) -> Losses:
        """Return a·CE + (1 - a)·τ²·KL(p_T^τ ‖ p_S^τ)."""
        logits = self(view.resized)
        ce = cross_entropy(logits, view.labels)
        kd = kd_loss(logits, self.cached_teacher_logits(view), self.temperature)
        return Losses(self.label_weight * ce + (1 - self.label_weight) * kd, {"ce": ce, "kd": kd}, logits)
