"""Training on labels: the teacher's and the control's module, and the base class of every strategy.

Here are its networks: how they are built, checked, loaded and saved. How they are trained is in trained.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdq_lightning.data.augmentation import View
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.normalization import Channels, Statistics
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.losses import cross_entropy
from kdq_lightning.modules.optimization import KERNEL_LEARNING_RATE
from kdq_lightning.modules.scores import Scores
from kdq_lightning.modules.strategy_check import check_strategy
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.trained import Losses, TrainedModule
from kdq_lightning.networks import NETWORKS, build_network, check_images, pretrained_state, strided_on_one_pixel
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.runs.checkpoints import checkpoint_statistics, load_trained, network_state
from kdq_lightning.runs.class_names import shorten_names
from kdq_lightning.runs.records import FLOAT_BITS
from kdq_lightning.runs.trained_network import Description, TrainedNetwork, grow_biases, load_state

__all__ = ["Classifier", "Losses"]

_WEIGHTS_FLAGS = ("--model.init_args.network", "--model.init_args.weights_mean", "--model.init_args.weights_std")


class Classifier(TrainedModule):
    """Trains one network on labels: the teacher, and the control, which is the student without a teacher.

    A strategy overrides `losses`; one with several networks also `networks`; one whose network is quantized already
    `packed_weights` and `packed_row`, and says so with `is_quantized`.
    """

    is_quantized = False
    is_seeded = True  # False where the command line says that nothing is

    def __init__(
        self,
        network: str,
        num_classes: int,
        learning_rate: float = 0.4,
        weight_decay: float = 5e-4,
        warmup: float = 0.25,
        weights: str | None = None,
        weights_mean: Channels | None = None,
        weights_std: Channels | None = None,
        strategy: str = "control",
        optimizer: Literal["muon"] | None = None,
        kernel_learning_rate: float | None = None,
        network_args: dict[str, Any] | None = None,
        pretrained: bool | None = None,
    ) -> None:
        """Build the network.

        Args:
            network: A name of `kdq list networks`, such as `resnet18` or `torchvision/mobilenet_v3_small`, or the
                import path of anything that is called with `num_classes`, such as `my_package.nets.build`.
            num_classes: Number of classes; the command line takes it from the data.
            learning_rate: Peak of the schedule, taken as it is, for the batch size of the config.
            weight_decay: L2 penalty on matrices and kernels; BatchNorm and biases have none.
            warmup: Share of the steps in which the learning rate rises linearly; it falls linearly to 0 after them.
            weights: Trained weights to start from: a run folder, a checkpoint, a packed file, or a plain state dict
                (`.safetensors`, `.pth`, `.pt`, `.pth.tar`, `.bin`).
            weights_mean: Channel means of the inputs that a plain state dict was trained on.
            weights_std: Their channel deviations.
            strategy: What records call this run; any name will do.
            optimizer: None is SGD; `muon` trains the convolutions' kernels, all but the stem's, by `muon.Muon`.
            kernel_learning_rate: Muon's rate of these kernels, 0.2 if not given, which falls linearly to 0 from the
                start; `learning_rate` is that of all other parameters.
            network_args: Further arguments of the network.
            pretrained: Whether to start from the weights that torchvision or timm publish; the last layer is a fresh
                one where they have another number of classes. The network then expects the statistics that they do.

        Raises:
            UserError: If the network is unknown, a number is out of range, or the class is no strategy of its own.
        """
        super().__init__()
        check_strategy(type(self), Classifier)
        self.save_hyperparameters()
        if kernel_learning_rate is not None and optimizer != "muon":
            raise UserError("kernel_learning_rate belongs to Muon: give --model.init_args.optimizer muon, too")
        self.kernel_learning_rate = KERNEL_LEARNING_RATE if kernel_learning_rate is None else kernel_learning_rate
        check_range("kernel_learning_rate", self.kernel_learning_rate, low=0, high=1e3)
        check_range("learning_rate", learning_rate, low=0, high=1e3)
        check_range("weight_decay", weight_decay, low=0, including_low=True)
        check_range("warmup", warmup, low=0, high=1, including_low=True)
        self.network_name, self.num_classes, self.strategy = network, num_classes, strategy
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.optimizer = optimizer
        self.weights = weights
        self.network_args, self.pretrained = dict(network_args or {}), bool(pretrained)
        self.notes: list[str] = []  # what the command says of the files that it has read
        self.origin: list[str] = []  # where the weights come from, in two lines
        self.validation_scores = {}
        self._build_networks()
        names = tuple(self.network_names().values())
        self.weights_description = Description(
            network, weights_mean, weights_std, _WEIGHTS_FLAGS, self.network_args, others=names
        )
        for module in self.networks().values():
            module.to(memory_format=torch.channels_last)
        self.scores = Scores(self.networks())

    @classmethod
    def for_timing(cls, options: Mapping[str, Any], teacher: Teacher | None, is_cached: bool) -> "Classifier":
        """Build a module whose training step takes as long as a step of this strategy, for measuring it.

        A strategy overrides this if its step needs a file that a study has yet to write, or its steps differ in cost.

        Args:
            options: Arguments of `__init__`; `weights` is ignored.
            teacher: An untrained network in the teacher's place; None if the strategy has no teacher.
            is_cached: Whether the teacher's logits on the training views are on disk already.
        """
        return cls(**{name: value for name, value in options.items() if name != "weights"})

    def _build_networks(self) -> None:
        self.network = build_network(self.network_name, self.num_classes, self.network_args)

    def networks(self) -> dict[str, nn.Module]:
        """Return the trained networks by the names that records, packed files and dashboards use."""
        return {self.network_name: self.network}

    def network_names(self) -> dict[str, str]:
        """Return the name that each of `networks()` was built by."""
        return {self.network_name: self.network_name}

    def packed_weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, QuantizedWeight]:
        """Return the quantized weights of a network that is quantized already, by layer; none for a float network.

        Args:
            state: State dict of a checkpoint of this module, from which they are read; None reads the present ones.
        """
        return {}

    @property
    def packed_row(self) -> tuple[str, int]:
        """The method that quantized such a network, and its bit width; of mixed bits its budget in bytes."""
        return DEFAULT_METHOD, max((weight.bits for weight in self.packed_weights().values()), default=FLOAT_BITS)

    def find_teacher(self) -> Teacher | None:
        """Return the teacher, with which quantized networks are compared; None if there is none."""
        return None

    def losses(self, view: View) -> Losses:
        """Return the loss of a training batch, its named parts and the logits: this is what makes a strategy.

        Args:
            view: The training batch. The trained network gets `view.resized`, a teacher `view.images`.
        """
        logits = self(view.resized)
        ce = cross_entropy(logits, view.labels)
        return Losses(ce, {"ce": ce}, logits)

    # --- weights and statistics

    def setup(self, stage: str) -> None:
        """Use the statistics of the data, or load trained weights with their statistics."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and self.statistics is None:
            self.statistics = data.statistics
        if isinstance(data, ImageDataModule):
            self._check_images(data.image_shape)
            if stage == "fit":
                self._check_gradients((data.image_shape[0], *[min(data.image_sizes or [data.image_size])] * 2))
        if self.weights is not None:
            self._load_networks(load_trained(self.weights, self.weights_description))
        elif self.pretrained and stage == "fit":
            self._load_pretrained()

    def _check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Refuse images that a network can't take; the project's own networks take any."""
        for key, name in self.network_names().items():
            if name not in NETWORKS:
                check_images(name, self.networks()[key], image_shape, self.num_classes)

    def _check_gradients(self, image_shape: tuple[int, ...]) -> None:
        """Refuse a network, other than the project's own, whose gradients torch computes wrongly.

        Args:
            image_shape: Channels, height and width of the smallest images that it is trained on.
        """
        if self.trainer.strategy.root_device.type != "cpu" or not str(self.trainer.precision).startswith("bf16"):
            return
        for key, name in self.network_names().items():
            if name in NETWORKS:
                continue
            if layer := strided_on_one_pixel(self.networks()[key], torch.zeros(1, *image_shape)):
                shape = " x ".join(map(str, image_shape))
                raise UserError(
                    f"of images of {shape} the layer {layer} of {name} sees a single pixel, where torch computes wrong"
                    " gradients in bfloat16 on a CPU: give --trainer.precision 32-true, or larger images"
                )

    def _load_pretrained(self) -> None:
        """Load published weights into every network; peers that expect different statistics are refused."""
        found = set()
        for key, network in self.networks().items():
            name = self.network_names()[key]
            published = pretrained_state(name, network, self.num_classes, self.network_args)
            network.load_state_dict(published.state)
            found.add(Statistics(published.mean, published.std))
            self.notes.append(f"{name} starts from published weights, and takes their statistics, not the data's")
        if len(found) > 1:
            raise UserError("the peers' published weights expect different statistics of their inputs: train from none")
        self.statistics = found.pop()

    def for_data(self, trained: TrainedNetwork, role: str = "") -> TrainedNetwork:
        """Return a trained network with its classes in the order of the data's labels; what is to be said is noted.

        Args:
            trained: With as many classes as the data.
            role: What the network is, for messages, such as "the teacher ".

        Raises:
            UserError: If it was trained on other classes.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            trained = trained.for_classes(data.class_names, data.dataset, role)
        self.notes += [note for note in trained.notes if note not in self.notes]
        return trained

    def _load_networks(self, trained: Mapping[str, TrainedNetwork]) -> None:
        if trained.keys() != self.networks().keys():
            raise UserError(f"{self.weights} holds {', '.join(trained)}; {', '.join(self.networks())} is asked for")
        for name, network in self.networks().items():
            source = trained[name]
            if source.network != self.network_names()[name]:
                raise UserError(f"{source.path} holds a {source.network}, not a {self.network_names()[name]}")
            if source.num_classes != self.num_classes:
                raise UserError(f"{source.path} has {source.num_classes} classes, the data {self.num_classes}")
            source = self.for_data(source)
            self.origin = self.origin or [str(source.path), source.origin(" + ".join(self.network_names().values()))]
            load_state(network, source.state, source.path)
            self.statistics = source.statistics

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write names and statistics of the networks into the checkpoint, which is then read without this class."""
        self._refuse_nan()
        prefixes = {id(module): name for name, module in self.named_modules()}
        checkpoint["networks"] = {
            name: {"network": self.network_names()[name], "prefix": f"{prefixes[id(network)]}."}
            | ({"network_args": self.network_args} if self.network_args else {})
            | ({"val_top1": self._validation_accuracy(name)} if self.validation_scores else {})
            for name, network in self.networks().items()
        }
        assert self.statistics is not None, "set by setup"
        checkpoint["data"] = {"num_classes": self.num_classes, **self.statistics._asdict()}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageDataModule):
            checkpoint["data"] |= {"dataset": data.dataset, "class_names": list(data.class_names)}
            checkpoint["data"] |= {"image_shape": data.image_shape}
        checkpoint["plan"] = self.resume_requirements()

    def _validation_accuracy(self, name: str) -> float:
        """Return the accuracy of a network in the last validation, in percent."""
        return float(self.validation_scores.get(f"top1/{name}", self.validation_scores["top1"]))

    def resume_requirements(self) -> dict[str, str | int | None]:
        """Return what a resumed run must share with the run that it goes on with."""
        return {
            "strategy": self.strategy,
            "optimizer": self.optimizer_text,
            "lr_scheduler": self.given_optimizer.lr_scheduler_text if self.given_optimizer else None,
            "seed_everything": getattr(self.trainer.datamodule, "seed", None) if self.is_seeded else None,  # type: ignore[attr-defined]
            "max_epochs": self.trainer.max_epochs,
            "max_steps": self.trainer.max_steps,
            "network_args": str(self.network_args) if self.network_args else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the statistics, and add the biases that weights from a packed file have.

        Raises:
            UserError: If the data now have other classes, or the same in another order.
        """
        try:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
        except RuntimeError:  # no trainer is attached
            data = None
        names = list(data.class_names) if isinstance(data, ImageDataModule) and hasattr(data, "train_set") else None
        if names is not None and (then := checkpoint["data"].get("class_names", names)) != names:
            raise UserError(
                f"this run began with the classes {shorten_names(then)}, and the data now have {shorten_names(names)}:"
                " give the same images, or leave out --ckpt_path"
            )
        self.statistics = checkpoint_statistics(checkpoint)
        for name, network in self.networks().items():
            grow_biases(network, network_state(checkpoint, name))
