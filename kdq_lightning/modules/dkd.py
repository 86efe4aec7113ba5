"""Decoupled distillation: CE + w·τ²·(α·TCKD + β·NCKD), w rising over the first twelfth of the epochs."""

from typing import Any

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import check_range
from kdq_lightning.losses import cross_entropy, dkd_parts
from kdq_lightning.modules.classifier import Losses
from kdq_lightning.modules.distillation import Distillation


class DecoupledKD(Distillation):
    """Weighs the target class and the others apart (Zhao et al. 2022, eq. 7): CE + w·τ²·(α·TCKD + β·NCKD).

    TCKD is the divergence of the two-class distributions (target, rest), NCKD that among the other classes.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        strategy: str = "dkd",
        **kwargs: Any,
    ) -> None:
        """Set the weights of the two parts and the temperature.

        Args:
            alpha: Weight of the target-class part, at least 0.
            beta: Weight of the non-target-class part, at least 0; it belongs to the pair of networks.
            temperature: τ > 0, finite, that softens both networks.
            strategy: What records call this run.
            **kwargs: Those of `Distillation`.
        """
        super().__init__(strategy=strategy, **kwargs)
        check_range("alpha", alpha, low=0, including_low=True)
        check_range("beta", beta, low=0, including_low=True)
        check_range("temperature", temperature, low=0, high=1e6)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def ramp(self) -> float:
        """Return the weight w = min((epoch + 1) / max(1, epochs / 12), 1) of this epoch."""
        return min((self.current_epoch + 1) / max(1, (self.trainer.max_epochs or 1) / 12), 1.0)

    def losses(self, view: View) -> Losses:
        """Return CE + w·τ²·(α·TCKD + β·NCKD)."""
        logits = self(view.resized)
        ce = cross_entropy(logits, view.labels)
        parts = dkd_parts(logits, self.cached_teacher_logits(view), view.labels, self.temperature)
        tckd, nckd = (self.temperature**2 * part.mean() for part in parts)
        loss = ce + self.ramp() * (self.alpha * tckd + self.beta * nckd)
        return Losses(loss, {"ce": ce, "tckd": tckd, "nckd": nckd}, logits)
