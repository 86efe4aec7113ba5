"""A trained run of this project as quantization reads it: any `Classifier`, on images in memory."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError
from kdq_lightning.evaluation import Split, evaluate
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.runs.checkpoints import find_checkpoint, load_trained, read_checkpoint
from kdq_lightning.runs.trained_network import TrainedNetwork, load_state, packed_metadata
from kdq_lightning.runs.versions import is_version
from kdq_lightning.training.source import Evaluations, Source

NUMBERS = ("learning_rate", "weight_decay", "warmup")
OF_STRATEGIES = ("label_weight", "temperature", "mixup_alpha", "alpha", "beta", "hint_share")
"""Hyper-parameters that only some strategies have, so that they are text in TensorBoard, empty for the others."""


class TrainedRun(Source):
    """The networks of a `Classifier`, and the images of an `ImageDataModule`.

    Attributes:
        module: The trained module.
        data: Its images.
        partial: Whether a limit of the trainer leaves out some of the images to evaluate on.
    """

    def __init__(self, trainer: Trainer, module: Classifier, test: bool, config_hash: str) -> None:
        """Look for the best checkpoint and choose the images to evaluate on.

        Args:
            trainer: With a datamodule.
            module: Trained; the best checkpoint in the folder, if there is one, replaces its weights.
            test: Whether the test images are evaluated.
            config_hash: Of the records.

        Raises:
            UserError: If there is no image to evaluate on, or a file is damaged.
        """
        super().__init__(trainer)
        self.module = module
        self.config_hash = config_hash
        self.data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        kept = any((self.folder / "checkpoints" / name).is_file() for name in ("best.ckpt", "last.ckpt"))
        self._checkpoint = find_checkpoint(self.folder) if kept else None
        whole = {"val": Split(self.data.train_set.images, self.data.train_set.labels).take(self.data.val_index)}
        if test:
            whole["test"] = Split(self.data.test_set.images, self.data.test_set.labels)
        counts = {name: self.limited(name, len(split.labels), self.data.batch_size) for name, split in whole.items()}
        self.partial = any(counts[name] < len(split.labels) for name, split in whole.items())
        self._splits = {name: split.take(slice(counts[name])) for name, split in whole.items() if counts[name]}
        self.splits = {name: counts[name] for name in self._splits}
        command, weights = ("fit", self.folder) if is_version(self.folder) else ("quantize", self._checkpoint)
        self.repeat = f"kdq {command} --config {self.folder}/config.yaml --ckpt_path {weights}"
        if not self.splits:
            raise UserError("there is neither a validation nor a test image to evaluate on: give data.val_size")

    @property
    def names(self) -> list[str]:
        """The names of `module.networks()`."""
        return list(self.module.networks())

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """The same names for every strategy, as TensorBoard takes its columns from one run: a number is one in all.

        TensorBoard sorts the names and shows the first five: epochs, learning rate, network, seed and strategy.
        """
        fields = [self.fields(name) for name in self.names]
        first, given = fields[0], self.module.hparams
        return {
            **{name: first[name] or 0 for name in ("epochs", "seed")},
            **{name: float(getattr(self.module, name)) for name in NUMBERS},
            "network": " + ".join(dict.fromkeys(field["network"] for field in fields)),
            "strategy": first["strategy"],
            **{f"strategy_{name}": _text(given.get(name)) for name in OF_STRATEGIES},
            "teacher": _text(given.get("teacher")),
            "trained_on": first["dataset"],
            "trained_by": self.module.optimizer_text,
        }

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a network's records that don't depend on the bit width."""
        network = self.module.network_names()[name]
        return {
            "run": self.run_name,
            "dataset": self.data.dataset,
            "network": network,
            "peer": "" if name == network else name,
            "partial": self.partial,
            **self._origin,
        }

    def metadata(self, name: str) -> dict[str, str]:
        """Return network, classes and statistics, with which a packed file is all that an evaluation needs."""
        network = self.module.network_names()[name]
        return packed_metadata(
            network,
            self.module.num_classes,
            self.statistics(name),
            network_args=self.module.network_args,
            class_names=self.data.class_names,
            image_shape=self.data.image_shape,
        )

    # --- images

    def inputs(self, name: str, count: int) -> Tensor:
        """Return this process's share of the calibration images, normalised for a network; see `Source.inputs`."""
        images, _ = self.data.calibration_images(count)
        return normalize(images[self.share(len(images))].to(self.device), self.statistics(name))

    def evaluate(self, name: str, network: nn.Module, progress: Callable[[int], None]) -> Evaluations:
        """Evaluate a network on every split, given the statistics of its inputs; see `Source.evaluate`."""
        statistics = self.statistics(name)
        return {key: evaluate(network, split, statistics, progress) for key, split in self._splits.items()}

    @cached_property
    def teacher_evaluations(self) -> Evaluations:
        """How the teacher classifies each split; nothing without a teacher, or if its file is gone."""
        teacher = self.module.find_teacher()
        if teacher is None:
            return {}
        network = teacher.network.to(self.device)
        return {name: evaluate(network, split, teacher.statistics) for name, split in self._splits.items()}

    # --- weights

    @cached_property
    def _trained(self) -> dict[str, TrainedNetwork]:
        """The networks of the best checkpoint; none if the module's own weights are to be used."""
        return {} if self._checkpoint is None else load_trained(self._checkpoint, self.module.weights_description)

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

    @property
    def packed_row(self) -> tuple[str, int]:
        """The method that quantized the network before it was trained, and its bits or budget."""
        return self.module.packed_row

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """The fields `strategy`, `seed` and `epochs` of records, as the checkpoint of the weights has them."""
        plan, epochs = self.module.resume_requirements(), None
        if self._weights_file.suffix == ".ckpt":
            checkpoint = read_checkpoint(self._weights_file)
            plan, epochs = checkpoint["plan"], checkpoint["epoch"] + 1
        if epochs is not None and int(plan["max_epochs"] or 0) > 0:
            epochs = plan["max_epochs"]
        return {"strategy": plan["strategy"], "seed": plan["seed_everything"], "epochs": epochs}


def _text(value: object) -> str:
    return "" if value is None else str(value)
