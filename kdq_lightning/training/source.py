"""Where quantization takes networks, images and evaluations from: a run of this project, or of any other."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Evaluation, percent
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.forwards import part_images
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.runs.versions import is_version

T = TypeVar("T")
Evaluations = Mapping[str, Evaluation | dict[str, float]]
"""How a network does on each split, by the split's name, "val" or "test": in full, or the numbers of a user."""


class Source(ABC):
    """The trained networks of a run, and the images that they are quantized and evaluated on.

    Every process has one and calls the same methods. It writes nothing.

    Attributes:
        trainer: The trainer of the run.
        folder: Folder of the results.
        device: To compute on.
        config_hash: Of the records; results of another hash count for nothing.
        splits: Number of images of each split that is evaluated, "val" and "test".
        has_vectors: Whether an evaluation says which images are classified correctly.
        repeat: What a user does to repeat a quantization that failed.
    """

    config_hash: str
    splits: Mapping[str, int]
    has_vectors = True
    repeat: str

    def __init__(self, trainer: Trainer) -> None:
        """Find folder and device; a collective call."""
        self.trainer = trainer
        self.folder = results_folder(trainer)
        self.device = trainer.strategy.root_device

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The names of the networks."""

    @property
    def packed_weights(self) -> dict[str, QuantizedWeight]:
        """The quantized weights that the network carries already, by layer; none of a float network."""
        return {}

    @property
    def packed_row(self) -> tuple[str, int]:
        """The method that quantized these weights, and their bit width; of mixed bits their budget in bytes."""
        return DEFAULT_METHOD, max(weight.bits for weight in self.packed_weights.values())

    @property
    def teacher_evaluations(self) -> Evaluations:
        """How a teacher classifies each split; nothing without one."""
        return {}

    @abstractmethod
    def network(self, name: str) -> nn.Module:
        """Return a copy of a network with its best weights, in float32 and eval mode, on the device."""

    @abstractmethod
    def inputs(self, name: str, count: int) -> Tensor:
        """Return this process's share of the calibration images as the network takes them, on the device.

        Args:
            name: Of the network.
            count: Calibration images of all processes together; where there are fewer training images, all of them.

        Raises:
            UserError: If they can't be read, or there are fewer of them than processes.
        """

    @abstractmethod
    def evaluate(self, name: str, network: nn.Module, progress: Callable[[int], None]) -> Evaluations:
        """Evaluate a network on every split.

        Args:
            name: Of the network that it is, or was quantized from.
            network: On the device.
            progress: Called with the number of images that were done since the last call.
        """

    @abstractmethod
    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a network's records that don't depend on the bit width."""

    @abstractmethod
    def metadata(self, name: str) -> dict[str, str]:
        """Return what the packed files of a network say of it."""

    @property
    @abstractmethod
    def hyperparameters(self) -> Mapping[str, Any]:
        """The hyper-parameters of the run, for the dashboard."""

    def measured(self, evaluations: Evaluations, floats: Evaluations | None) -> dict[str, Any]:
        """Return the fields of a record that come from evaluations.

        Args:
            evaluations: Of the network.
            floats: Of the float network; None if there is none to compare with.
        """
        found: dict[str, Any] = {}
        for split in ("val", "test"):
            evaluation = evaluations.get(split)
            for name in ("top1", "top5"):
                found[f"{split}_{name}"] = getattr(evaluation, name, None)
        measured, whole, teacher = map(self._main, (evaluations, floats, self.teacher_evaluations))
        assert measured is not None
        return {
            **found,
            "agreement_float": percent(measured.classes == whole.classes) if whole else None,
            "agreement_teacher": percent(measured.classes == teacher.classes) if teacher else None,
            "flips": percent(measured.correct != whole.correct) if whole else None,
            "nll": measured.nll,
            "ece": measured.ece,
        }

    def _main(self, evaluations: Evaluations | None) -> Evaluation | None:
        """Return the evaluation of the main split, if there is one in full."""
        found = evaluations.get(self.main_split) if evaluations else None
        return found if isinstance(found, Evaluation) else None

    @property
    def main_split(self) -> str:
        """The split that everything but accuracy is measured on."""
        return "test" if "test" in self.splits else "val"

    @property
    def evaluation_images(self) -> int:
        """Number of images that a network is evaluated on, all splits together."""
        return sum(self.splits.values())

    @property
    def run_name(self) -> str:
        """The run's name in records."""
        return (self.folder.parent if is_version(self.folder) else self.folder.resolve()).name

    # --- limits and shares

    def limited(self, split: str, images: int, batch_size: int) -> int:
        """Return how many images of a split the trainer's limits leave.

        Args:
            split: "val" or "test".
            images: In the whole split.
            batch_size: Of its loader.
        """
        limit = getattr(self.trainer, f"limit_{split}_batches")
        batches = -(-images // batch_size)
        return min(images, (limit if isinstance(limit, int) else int(limit * batches)) * batch_size)

    def share(self, count: int) -> slice:
        """Return this process's block of the calibration images.

        Blocks end where a single process cuts the images for its forwards, so that all processes together repeat its
        products, and hold as many of these pieces or one more; where there are more processes, pieces are smaller.

        Args:
            count: Calibration images of all processes together.
        """
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        piece = min(part_images(count), 1 << max(0, (count // world_size).bit_length() - 1))
        pieces = -(-count // piece)
        return slice(pieces * rank // world_size * piece, min(count, pieces * (rank + 1) // world_size * piece))

    # --- processes

    def stop_if_terminated(self) -> None:
        """Leave if SIGTERM was received: Lightning only notes it, and acts on it while training.

        Raises:
            SIGTERMException: What Lightning raises then.
        """
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def on_rank_zero(self, action: Callable[[], None]) -> None:
        """Run something on rank 0; if it fails there it fails on every rank, instead of leaving the others waiting.

        Raises:
            UserError: If it raised that or an OSError.
        """
        failure = None
        if self.trainer.is_global_zero:
            try:
                action()
            except (UserError, OSError) as error:
                failure = str(error)
        failure = self.trainer.strategy.broadcast(failure)
        if failure is not None:
            raise UserError(failure)

    def from_rank_zero(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        found: T = self.trainer.strategy.broadcast(value)
        return found


def results_folder(trainer: Trainer) -> Path:
    """Return the folder of the first logger's run, or the default root without a logger; a collective call."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    logger = trainer.logger
    if logger is not None and logger.log_dir is None:  # its folder is that of all runs
        folder = folder / str(logger.name) / str(logger.version)
    found: Path = trainer.strategy.broadcast(folder)
    return found
