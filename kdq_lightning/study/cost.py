"""Seconds that a run takes on this machine, from a few measured steps, forwards and one quantization."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdq_lightning.bench.measure import interleaved
from kdq_lightning.bench.step import round_up, trainer_seconds
from kdq_lightning.commands.arguments import load_class
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import quantize
from kdq_lightning.quantization.methods import choose_methods
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.study.run import Run

BATCHES = 3  # training batches that are measured, at least
REPEATS = 3  # of a forward; the median counts
IMAGES = 128  # of a forward
LEARNING_RATE = 1e-6  # while steps are timed, which costs as much as any


class RunCost(NamedTuple):
    """What a run takes.

    Attributes:
        epoch: Seconds of an epoch, validation included, the mean over the image sizes; 0 if nothing is trained.
        after: Seconds of what comes after training: quantization and evaluation.
    """

    epoch: float
    after: float


class Architecture(NamedTuple):
    """A network before it is trained: its name, and its arguments if it has any."""

    name: str
    network_args: Mapping[str, Any] | None

    def build(self, data: ImageDataModule) -> nn.Module:
        """Build it for the data's classes."""
        return build_network(self.name, data.num_classes, self.network_args)


class CostMeter:
    """Measures what runs take; what has the same networks, options and images is measured once."""

    def __init__(
        self, runs: Iterable[Run], at_once: int = 1, announce: Callable[[str], None] = lambda what: None
    ) -> None:
        """Read the settings of all runs of a study.

        Args:
            runs: All of them, in order: teachers are looked up among them, and logits that an earlier one keeps.
            at_once: How many of them run at the same time.
            announce: Told what is measured next, in words, as a measurement can take minutes.
        """
        self.runs, self.at_once, self.announce = list(runs), at_once, announce
        self.configs = {run: run.read_settings(run.settings_arguments).config for run in self.runs}
        on_cpu = any(config["trainer"]["accelerator"] == "cpu" for config in self.configs.values())
        self.device = torch.device("cpu" if on_cpu or not torch.cuda.is_available() else "cuda")
        self._data: dict[str, ImageDataModule] = {}
        self._views: dict[str, dict[str, object]] = {}
        self._networks: dict[Run, Architecture] = {}  # the first network of each run that teaches
        self._seconds: dict[tuple[object, ...], float] = {}

    def change(self, run: Run, key: str, value: object) -> None:
        """Measure a run with an option, such as `data.init_args.batch_size`, in place of its config's."""
        *groups, name = key.split(".")
        section = self.configs[run]
        for group in groups:
            section = section[group]
        section[name] = value

    def data(self, run: Run) -> ImageDataModule:
        """Return the images of a run; all runs of the same data share them."""
        section = self.configs[run]["data"]
        if (key := str(section)) not in self._data:
            self._data[key] = load_class(section["class_path"])(**section["init_args"])
            self._data[key].setup()
        return self._data[key]

    def image_sizes(self, run: Run) -> list[int]:
        """Return the sides in pixels of the images that a run trains on, each for an equal share of the epochs."""
        data = self.data(run)
        return data.image_sizes or [data.image_size]

    def max_epochs(self, run: Run) -> int:
        """Return the number of epochs in the config of a run, 0 if nothing is trained.

        Raises:
            UserError: If the config names none.
        """
        epochs = self.configs[run]["trainer"]["max_epochs"] if run.command == "fit" else 0
        if epochs is None or epochs < 0:
            raise UserError(f"{run.name} says no number of epochs: give trainer.max_epochs")
        return int(epochs)

    def measure(self, run: Run) -> RunCost:
        """Measure a run.

        Raises:
            UserError: If the teacher is neither one of the runs nor a file.
        """
        data, quantization, trainer = self.data(run), self.configs[run]["quantization"], self.configs[run]["trainer"]
        module = self._module(run)
        networks = [Architecture(name, module.network_args) for name in module.network_names().values()]
        forward = sum(self.forward_seconds(network, data) for network in networks)
        after = 0.0
        if quantization["enabled"]:
            choices = [quantization[name] for name in ("methods", "solver", "codebook")]
            methods = {} if self._strategy(run).is_quantized else choose_methods(*choices)
            bits = tuple(quantization["bits"])
            evaluated = len(data.val_index) + quantization["test"] * len(data.test_set)
            after = (len(methods) * len(bits) + 1) * evaluated * forward
            if teacher := self._teacher_network(run):
                after += evaluated * self.forward_seconds(teacher, data)
            count = quantization["calibration_images"]
            for name, method in methods.items():
                after += sum(self.quantization_seconds(net, data, count, bits, name, method) for net in networks)
        if run.command != "fit":
            return RunCost(0.0, after)
        sizes = self.image_sizes(run)
        batch = sum(self.batch_seconds(run, module, size) for size in sizes) / len(sizes)
        batches = max(len(data.train_index) // data.batch_size, 1)
        limit = trainer["limit_train_batches"]
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
        return RunCost(batches * batch + len(data.val_index) * forward, after)

    def batch_seconds(self, run: Run, module: Classifier, size: int) -> float:
        """Return the seconds of a training batch, its share of an optimizer step included.

        Args:
            run: The run.
            module: What its strategy gives `for_timing`.
            size: Side in pixels of the images that the trained network gets.
        """
        data, trainer = self.data(run), self.configs[run]["trainer"]
        options = {name: trainer[name] for name in ("precision", "accumulate_grad_batches")}
        batches = round_up(BATCHES, trainer["accumulate_grad_batches"])

        def measure() -> float:
            own, data.image_sizes = data.image_sizes, [size]
            try:
                return trainer_seconds(module, data, batches, accelerator=self.device.type, **options) / batches
            finally:
                data.image_sizes = own

        taught = str(self._teacher_network(run)), self._finds_logits(run)
        key = (type(module), str(module.hparams), *taught, size, str(options), id(data))
        return self._once(f"training batches of {data.batch_size} images of {size} x {size}", key, measure)

    def _strategy(self, run: Run) -> type[Classifier]:
        strategy: type[Classifier] = load_class(self.configs[run]["model"]["class_path"])
        return strategy

    def _module(self, run: Run) -> Classifier:
        """Return a module whose training batch costs what one of the run costs, its teacher untrained."""
        data, taught_by = self.data(run), self._teacher_network(run)
        teacher = Teacher(taught_by.build(data), data.statistics, taught_by.name) if taught_by else None
        options = {**self.configs[run]["model"]["init_args"], "num_classes": data.num_classes}
        module = self._strategy(run).for_timing(options, teacher, self._finds_logits(run))
        # So few steps start at the schedule's peak, at which some networks would diverge and end the measurement.
        module.learning_rate = module.kernel_learning_rate = LEARNING_RATE
        return module

    def _teacher_network(self, run: Run) -> Architecture | None:
        """Return the network of the teacher: as the options say, or the run or the file that it comes from."""
        model = self.configs[run]["model"]["init_args"]
        if run.command != "fit" or not model.get("teacher"):
            return None
        if model.get("teacher_network"):
            return Architecture(str(model["teacher_network"]), model.get("teacher_network_args"))
        for other in self.runs:
            if str(other.folder) == model["teacher"]:
                if other not in self._networks:
                    module = self._module(other)
                    name = next(iter(module.network_names().values()))
                    self._networks[other] = Architecture(name, module.network_args)
                return self._networks[other]
        trained = next(iter(load_trained(model["teacher"]).values()))
        return Architecture(trained.network, trained.network_args)

    def _finds_logits(self, run: Run) -> bool:
        """Return whether a run before this one, not beside it, keeps the teacher's logits on the same views."""

        def wanted(other: Run) -> tuple[object, ...]:
            model = self.configs[other]["model"]["init_args"]
            return model.get("teacher_cache"), model.get("teacher"), other.seed, self._view_key(other)

        if self.at_once > 1 or self.configs[run]["model"]["init_args"].get("teacher_cache") is None:
            return False
        return wanted(run) in map(wanted, self.runs[: self.runs.index(run)])

    def _view_key(self, run: Run) -> dict[str, object]:
        key = str(self.configs[run]["data"])
        if key not in self._views:
            self._views[key] = self.data(run).view_key()
        return self._views[key]

    def forward_seconds(self, architecture: Architecture, data: ImageDataModule) -> float:
        """Return the seconds of a network's forward in evaluation, per image."""
        network, images = self._network_and_images(architecture, data, IMAGES)

        @torch.no_grad()
        def forward() -> float:
            return float(network(images).sum())  # which waits for the device

        def measure() -> float:
            return interleaved({"forward": forward}, REPEATS)["forward"].median / len(images)

        return self._once(f"an evaluation by {architecture.name}", ("forward", str(architecture), id(data)), measure)

    def quantization_seconds(
        self,
        architecture: Architecture,
        data: ImageDataModule,
        count: int,
        bits: Sequence[int],
        name: str,
        method: Mapping[str, Any],
    ) -> float:
        """Return the seconds of quantizing a network by a method at all bit widths together, on `count` images.

        Args:
            architecture: The network.
            data: Its images.
            count: Number of them.
            bits: Bit widths.
            name: Of the method.
            method: Its options.
        """
        network, images = self._network_and_images(architecture, data, count)

        def measure() -> float:
            start = time.perf_counter()
            quantize(network, [images], bits, **method)
            return time.perf_counter() - start

        what = f"the quantization of {architecture.name} on {count} images, method {name}"
        return self._once(what, ("quantize", str(architecture), count, bits, str(method), id(data)), measure)

    def _network_and_images(
        self, architecture: Architecture, data: ImageDataModule, count: int
    ) -> tuple[nn.Module, Tensor]:
        network = architecture.build(data).eval().to(self.device).to(memory_format=torch.channels_last)
        return network, data.normalize(data.train_set.images[:count]).to(self.device)

    def _once(self, what: str, key: tuple[object, ...], measure: Callable[[], float]) -> float:
        """Return the seconds of something that is measured the first time it is asked for.

        Args:
            what: It is, in words.
            key: All that its seconds depend on.
            measure: Returns its seconds.
        """
        if key not in self._seconds:
            self.announce(what)
            self._seconds[key] = measure()
        return self._seconds[key]
