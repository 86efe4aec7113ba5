"""A trained run as quantization reads it: networks with their best weights, images to calibrate and evaluate on."""

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Evaluation, Split, evaluate
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.forwards import part_images
from kdq_lightning.runs.checkpoints import TrainedNetwork, find_checkpoint, load_state, load_trained, read_checkpoint

T = TypeVar("T")
Evaluations = dict[str, Evaluation]
"""How a network classifies each split, by the split's name, "val" or "test"."""


class TrainedRun:
    """The trained networks of a run, and the images that they are quantized and evaluated on.

    Every process has one and calls the same methods. It writes nothing.

    Attributes:
        trainer: With a logger.
        module: The trained module.
        data: Its images.
        folder: The version's folder.
        device: To compute on.
        splits: Images to evaluate on by name, "val" and "test"; a split that is empty or left alone is missing.
        partial: Whether a limit of the trainer leaves out some of these images.
    """

    def __init__(self, trainer: Trainer, module: Classifier, test: bool) -> None:
        """Look for the best checkpoint and choose the images to evaluate on.

        Args:
            trainer: With a logger, whose folder is the version's.
            module: Trained; the best checkpoint in the folder, if there is one, replaces its weights.
            test: Whether the test images are evaluated.

        Raises:
            UserError: If there is no image to evaluate on, or a file is damaged.
        """
        self.folder = Path(trainer.log_dir or "")
        self.device = trainer.strategy.root_device
        self.module = module
        self.data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.trainer = trainer
        kept = any((self.folder / "checkpoints" / name).is_file() for name in ("best.ckpt", "last.ckpt"))
        self._checkpoint = find_checkpoint(self.folder) if kept else None
        self.splits, self.partial = self._choose_splits(test)
        if not self.splits:
            raise UserError("there is neither a validation nor a test image to evaluate on: give data.val_size")

    def _choose_splits(self, test: bool) -> tuple[dict[str, Split], bool]:
        """Return the images to evaluate on, and whether a limit leaves some of them out."""
        data, splits, partial = self.data, {}, False
        whole = {"val": (data.train_set, data.val_index)}
        if test:
            whole["test"] = (data.test_set, slice(None))  # type: ignore[assignment]
        for name, (images, index) in whole.items():
            split = Split(images.images[index], images.labels[index])
            limit = getattr(self.trainer, f"limit_{name}_batches")
            batches = -(-len(split.labels) // data.batch_size)
            kept = limit if isinstance(limit, int) else int(limit * batches)
            partial |= kept < batches
            count = kept * data.batch_size
            if len(split.labels[:count]):
                splits[name] = Split(split.images[:count], split.labels[:count])
        return splits, partial

    # --- images

    @property
    def evaluation_images(self) -> int:
        """Number of images that a network is evaluated on, all splits together."""
        return sum(len(split.labels) for split in self.splits.values())

    def calibration_share(self, count: int) -> Tensor:
        """Return this process's block of the calibration images, uint8, (images, 3, h, w).

        Blocks end where a single process cuts the images for its forwards, so that all processes together repeat its
        products, and hold as many of these pieces or one more; where there are more processes, pieces are smaller.

        Args:
            count: Calibration images of all processes together.

        Raises:
            UserError: If there are not as many training images.
        """
        images, _ = self.data.calibration_images(count)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        piece = min(part_images(count), 1 << max(0, (count // world_size).bit_length() - 1))
        pieces = -(-count // piece)
        return images[pieces * rank // world_size * piece : pieces * (rank + 1) // world_size * piece]

    def evaluate(self, name: str, network: nn.Module, progress: Callable[[int], None]) -> Evaluations:
        """Evaluate a network on every split.

        Args:
            name: Of the network, whose inputs' statistics are used.
            network: That network, quantized or not, on the device.
            progress: Called with the number of images that were done since the last call.
        """
        statistics = self.statistics(name)
        return {key: evaluate(network, split, statistics, progress) for key, split in self.splits.items()}

    @cached_property
    def teacher_evaluations(self) -> Evaluations:
        """How the teacher classifies each split; nothing without a teacher, or if its file is gone."""
        teacher = self.module.find_teacher()
        if teacher is None:
            return {}
        network = teacher.network.to(self.device)
        return {name: evaluate(network, split, teacher.statistics) for name, split in self.splits.items()}

    # --- weights

    @cached_property
    def _trained(self) -> dict[str, TrainedNetwork]:
        """The networks of the best checkpoint; none if the module's own weights are to be used."""
        return {} if self._checkpoint is None else load_trained(self._checkpoint)

    def network(self, name: str) -> nn.Module:
        """Return a copy of a network with its best weights, in float32 and eval mode, on the device."""
        network = copy.deepcopy(self.module.networks()[name]).float()
        if self._trained:
            load_state(network, self._trained[name].state, self._trained[name].path)
        return network.to(self.device).eval()

    def statistics(self, name: str) -> Statistics:
        """Return the statistics that a network expects of its inputs."""
        statistics = self._trained[name].statistics if name in self._trained else self.module.statistics
        assert statistics is not None, "set by the module's setup"
        return statistics

    @property
    def _weights_file(self) -> Path:
        """The file that the weights come from; the empty path if they come from none."""
        return self._checkpoint or Path(self.module.weights or "")

    @cached_property
    def packed_weights(self) -> dict[str, QuantizedWeight]:
        """The quantized weights that the module's network already carries, by layer; none of a float network."""
        if self._weights_file.suffix != ".ckpt" or not self.module.is_quantized:
            return self.module.packed_weights()
        return self.module.packed_weights(read_checkpoint(self._weights_file)["state_dict"])

    @cached_property
    def origin(self) -> dict[str, Any]:
        """The fields `strategy`, `seed` and `epochs` of records, as the checkpoint of the weights has them."""
        plan, epochs = self.module.resume_requirements(), None
        if self._weights_file.suffix == ".ckpt":
            checkpoint = read_checkpoint(self._weights_file)
            plan, epochs = checkpoint["plan"], checkpoint["epoch"] + 1
        if epochs is not None and int(plan["max_epochs"] or 0) > 0:
            epochs = plan["max_epochs"]
        return {"strategy": plan["strategy"], "seed": plan["seed_everything"], "epochs": epochs}

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
