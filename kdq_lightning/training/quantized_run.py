"""What the records of one run have in common: its weights, its images, its folder."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

import kdq_lightning
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.normalization import Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Evaluation, Split, evaluate, percent
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization import Quantized
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.forwards import part_images
from kdq_lightning.quantization.packing import save_packed
from kdq_lightning.runs.checkpoints import (
    TrainedNetwork,
    find_checkpoint,
    load_state,
    load_trained,
    packed_metadata,
    read_checkpoint,
    state_dict_bytes,
)
from kdq_lightning.runs.records import FLOAT_BITS, LayerRecord, Record
from kdq_lightning.runs.result_folder import ResultFolder

Evaluations = dict[str, Evaluation]
"""What a network makes of each split, "val" and "test"."""


class QuantizedRun:
    """A trained run on its way through quantization; every rank has one and calls the same methods.

    Attributes:
        folder: Of the version.
        splits: Images to evaluate on by name, "val" and "test"; those that are empty or left alone are not among them.
        device: To compute on.
    """

    def __init__(self, trainer: Trainer, module: Classifier, config_hash: str, test: bool) -> None:
        """Look at what is there.

        Args:
            trainer: With a logger, whose folder gets the results.
            module: Trained; the best checkpoint in the folder, if there is one, replaces its weights.
            config_hash: Of the records.
            test: Whether the test images are evaluated.

        Raises:
            UserError: If there is no image to evaluate on, or a file is damaged.
        """
        self.folder = Path(trainer.log_dir or "")
        self.device = trainer.strategy.root_device
        self.trainer, self.module, self.config_hash = trainer, module, config_hash
        self.data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        kept = any((self.folder / "checkpoints" / name).is_file() for name in ("best.ckpt", "last.ckpt"))
        self.checkpoint = find_checkpoint(self.folder) if kept else None
        self.splits, self.partial = self._splits(test)
        if not self.splits:
            raise UserError("there is neither a validation nor a test image to evaluate on: give data.val_size")

    def _splits(self, test: bool) -> tuple[dict[str, Split], bool]:
        """Return the images to evaluate on, and whether a limit leaves some of them out."""
        data, found, partial = self.data, {}, False
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
                found[name] = Split(split.images[:count], split.labels[:count])
        return found, partial

    @cached_property
    def results(self) -> ResultFolder:
        """The folder's results, for rank 0 alone: the others would read while it writes."""
        return ResultFolder(self.folder, self.config_hash)

    def missing(self, name: str, bits: Iterable[int]) -> list[int]:
        """Return those of the bit widths of a network whose results are not in the folder."""
        missing: list[list[int]] = []
        self.on_rank_zero(lambda: missing.append(self.results.missing(name, bits)))
        found: list[int] = self.trainer.strategy.broadcast(missing)[0]
        return found

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

    @cached_property
    def _trained(self) -> dict[str, TrainedNetwork]:
        """The networks of the best checkpoint; none if the module's own weights are the ones."""
        return {} if self.checkpoint is None else load_trained(self.checkpoint)

    def stop_if_terminated(self) -> None:
        """Leave if the process was told to: Lightning only notes SIGTERM, and acts while training.

        Raises:
            SIGTERMException: What Lightning raises then.
        """
        if self.trainer.received_sigterm:
            raise SIGTERMException

    def network(self, name: str) -> nn.Module:
        """Return a copy of a network with its best weights, in float32 and eval mode, on the device."""
        network = copy.deepcopy(self.module.networks()[name]).float()
        if self._trained:
            load_state(network, self._trained[name].state, self._trained[name].path)
        return network.to(self.device).eval()

    @cached_property
    def carried(self) -> dict[str, QuantizedWeight]:
        """The quantized weights that the module's network already carries, by layer; none of a float network."""
        file = self.checkpoint or Path(self.module.weights or "")
        if file.suffix != ".ckpt" or not self.module.is_quantized:
            return self.module.packed_weights()
        return self.module.packed_weights(read_checkpoint(file)["state_dict"])

    def statistics(self, name: str) -> Statistics:
        """Return the statistics that a network expects of its inputs."""
        statistics = self._trained[name].statistics if name in self._trained else self.module.statistics
        assert statistics is not None, "set by the module's setup"
        return statistics

    def calibration_share(self, count: int) -> Tensor:
        """Return this rank's block of the calibration images, uint8, (images, 3, h, w).

        Blocks end where a single process cuts the images for its forwards, so that all ranks together repeat its
        products, and hold as many of these pieces or one more; where there are more ranks, pieces are smaller.
        """
        images, _ = self.data.calibration_images(count)
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        piece = min(part_images(count), 1 << max(0, (count // world_size).bit_length() - 1))
        pieces = -(-count // piece)
        return images[pieces * rank // world_size * piece : pieces * (rank + 1) // world_size * piece]

    @cached_property
    def teacher(self) -> Evaluations:
        """What the teacher makes of each split; nothing without a teacher, or if its file is gone."""
        teacher = self.module.find_teacher()
        if teacher is None:
            return {}
        network = teacher.network.to(self.device)
        return {name: evaluate(network, split, teacher.statistics) for name, split in self.splits.items()}

    def save_float(self, name: str, network: nn.Module, found: Evaluations) -> None:
        """Record the float network; its bytes are those of a `.safetensors` file of its state dict."""
        record = self._record(name, FLOAT_BITS, found, found, packed_bytes=len(state_dict_bytes(network)))
        self.on_rank_zero(lambda: self.results.add(record, _correct(found)))

    def save_quantized(
        self, name: str, bits: int, quantized: Quantized, found: Evaluations, floats: Evaluations
    ) -> None:
        """Pack and record a network at one bit width.

        Args:
            name: Of the network.
            bits: Bit width.
            quantized: The network at this bit width.
            found: What it makes of each split.
            floats: What the float network makes of each split.
        """
        solved = [layer for layer in quantized.layers if layer.codebook]
        solver, codebook = (
            "+".join(sorted({getattr(layer, key) for layer in solved})) for key in ("solver", "codebook")
        )
        record = self._record(
            name,
            bits,
            found,
            floats,
            solver=solver,
            codebook=codebook,
            levels=max(layer.levels for layer in solved),
            relative_error=sum(layer.relative_error for layer in solved) / len(solved),
            seconds=sum(layer.seconds for layer in solved),
        )
        layers = [LayerRecord(**vars(layer), network=name, bits=bits) for layer in quantized.layers]

        def write() -> None:
            path = self.results.packed_path(name, codebook, bits)
            quantized.save(path, self._metadata(name, record))
            self.results.add(replace(record, packed_bytes=path.stat().st_size), _correct(found), layers)

        self.on_rank_zero(write)

    def save_carried(self, name: str, network: nn.Module, found: Evaluations) -> None:
        """Pack and record a network that carries codes; there is no float network to compare it with.

        Args:
            name: Of the network.
            network: With the weights that the codes stand for.
            found: What it makes of each split.
        """
        weights = list(self.carried.values())
        bits = max(weight.bits for weight in weights)
        codebook = "+".join(sorted({weight.codebook for weight in weights}))
        levels = max(weight.grid.numel() for weight in weights)
        record = self._record(name, bits, found, None, codebook=codebook, levels=levels)

        def write() -> None:
            path = self.results.packed_path(name, codebook, bits)
            save_packed(path, network, self.carried, self._metadata(name, record))
            self.results.add(replace(record, packed_bytes=path.stat().st_size), _correct(found))

        self.on_rank_zero(write)

    def _metadata(self, name: str, record: Record) -> dict[str, str]:
        more = ("dataset", "strategy", "peer", "seed", "bits", "config_hash")
        return packed_metadata(
            record.network,
            self.module.num_classes,
            self.statistics(name),
            **{key: str(getattr(record, key)) for key in more},
        )

    def _record(self, name: str, bits: int, found: Evaluations, floats: Evaluations | None, **measured: Any) -> Record:
        network = self.module.network_names()[name]
        main = "test" if "test" in found else "val"
        classes, correct = found[main].classes, found[main].correct
        return Record(
            run=self.folder.parent.name,
            dataset=self.data.dataset,
            network=network,
            peer="" if name == network else name,
            bits=bits,
            val_top1=found["val"].top1 if "val" in found else None,
            val_top5=found["val"].top5 if "val" in found else None,
            test_top1=found["test"].top1 if "test" in found else None,
            test_top5=found["test"].top5 if "test" in found else None,
            agreement_float=None if floats is None else percent(classes == floats[main].classes),
            agreement_teacher=percent(classes == self.teacher[main].classes) if self.teacher else None,
            flips=None if floats is None else percent(correct != floats[main].correct),
            nll=found[main].nll,
            ece=found[main].ece,
            partial=self.partial,
            config_hash=self.config_hash,
            version=kdq_lightning.__version__,
            **self._origin,
            **{**FLOAT_ROW, **measured},
        )

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """How the weights came about: as their checkpoint says, if they come from one."""
        file = self.checkpoint or Path(self.module.weights or "")
        plan, epochs = self.module.resume_requirements(), None
        if file.suffix == ".ckpt":
            checkpoint = read_checkpoint(file)
            plan, epochs = checkpoint["plan"], checkpoint["epoch"] + 1
        if epochs is not None and int(plan["max_epochs"] or 0) > 0:
            epochs = plan["max_epochs"]
        return {"strategy": plan["strategy"], "seed": plan["seed_everything"], "epochs": epochs}


FLOAT_ROW = {"solver": "", "codebook": "", "levels": None, "packed_bytes": 0, "relative_error": None, "seconds": None}
"""What the float network has of the fields that quantization fills."""


def _correct(found: Evaluations) -> dict[str, Tensor]:
    return {split: evaluation.correct for split, evaluation in found.items()}
