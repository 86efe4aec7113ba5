"""What validation and test log: the evaluation of every network of a module, and the means over them."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from kdq_lightning.evaluation import Evaluation, Evaluator

LOGGED = {"top1": "top1", "top5": "top5", "ece": "ece", "loss": "nll"}
"""The fields of an evaluation by the names that they are logged under."""


OF_EACH = [name for name in LOGGED if name != "loss"]  # of several networks, beside the means


class Scores(nn.Module):
    """An evaluator a network; a module, so that they move to the device with the one that holds them."""

    def __init__(self, names: Iterable[str]) -> None:
        """Name the networks."""
        super().__init__()
        self.names = list(names)
        self.evaluators = nn.ModuleList(Evaluator() for _ in self.names)

    def update(self, logits: Mapping[str, Tensor], labels: Tensor, index: Tensor) -> None:
        """Add a batch, which may be empty: a rank's last one.

        Args:
            logits: float32, (batch, classes), by network.
            labels: int64, (batch,), class indices.
            index: int64, (batch,), place of each image in the split.
        """
        for name, values in logits.items():
            self.evaluators[self.names.index(name)].update(values, labels, index)  # type: ignore[operator]

    def logged_names(self) -> list[str]:
        """Return the names of the scores."""
        peers = self.names if len(self.names) > 1 else []
        return [*LOGGED, *(f"{key}/{name}" for name in peers for key in OF_EACH)]

    def compute_and_reset(self) -> dict[str, float]:
        """Return the scores over all ranks' images, and start afresh.

        Returns:
            `top1`, `top5` and `ece` in percent and `loss`, means over the networks; of several networks also the
            percentages of each, as `top1/<name>` and so on.
        """
        evaluations: dict[str, Evaluation] = {}
        for name, evaluator in zip(self.names, self.evaluators, strict=True):
            evaluations[name] = evaluator.evaluation()  # type: ignore[operator]
            evaluator.reset()  # type: ignore[operator]
        scores = {
            key: sum(getattr(evaluation, field) for evaluation in evaluations.values()) / len(evaluations)
            for key, field in LOGGED.items()
        }
        if len(evaluations) > 1:
            scores |= {
                f"{key}/{name}": getattr(evaluation, LOGGED[key])
                for name, evaluation in evaluations.items()
                for key in OF_EACH
            }
        return scores
