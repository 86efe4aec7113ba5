"""A trained network as files hold it: its name and weights, and what it was trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kdq_lightning.data.normalization import Channels, Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network, is_listed, reorder_classes
from kdq_lightning.runs.class_names import class_order, decode_names, encode_names, shorten_names
from kdq_lightning.runs.state_dicts import METADATA_KEY


@dataclass(frozen=True)
class Description:
    """What a user says of a file's network: all there is to say of a plain state dict, which says nothing of itself.

    Attributes:
        network: Name of its network.
        mean: Channel means of the network's inputs.
        std: Channel deviations of the network's inputs.
        flags: What the command line calls these three, for messages.
        network_args: Further arguments of the network.
        others: Names of other networks that the file may hold, as the user gave them.
    """

    network: str | None = None
    mean: Channels | None = None
    std: Channels | None = None
    flags: tuple[str, str, str] = ("--network", "--mean", "--std")
    network_args: Mapping[str, Any] | None = None
    others: tuple[str, ...] = ()

    def check_may_build(self, file: Path, network: str, network_args: Mapping[str, Any]) -> None:
        """Refuse a file that would import code: it may name a listed network, or the one that the user named.

        Args:
            file: The file, for the message.
            network: Name that it gives.
            network_args: Arguments that it gives.

        Raises:
            UserError: If the name is another import path, or that path's arguments are not the user's.
        """
        if is_listed(network) or ("." not in network and "/" not in network):  # the latter is no import path
            return
        if network not in (self.network, *self.others):
            raise UserError(
                f"{file} names the network {network}, which is neither built in nor in the lists of torchvision and"
                f" timm, and files import no code: give {self.flags[0]} {network} if you know and trust it"
            )
        if dict(network_args) != dict(self.network_args or {}):
            raise UserError(
                f"{file} gives {network} the arguments {dict(network_args)}, and the command line gives it"
                f" {dict(self.network_args or {})}: files call no code with arguments of theirs, so give"
                f" {self.flags[0]}_args the same"
            )


@dataclass(frozen=True)
class TrainedNetwork:
    """A network's name, what it was trained on and its weights.

    Attributes:
        network: Its name.
        num_classes: Width of its last layer.
        statistics: Those of the inputs that it expects.
        state: Its state dict; it may hold biases that layers gained by quantization (see `grow_biases`).
        path: The file that it was read from.
        network_args: Further arguments that it is built with.
        dataset: Name of the data that it was trained on; "" if the file doesn't say.
        class_names: Names of its classes, in the order of its outputs; none if the file doesn't say.
        image_shape: Channels, height and width of the images that it was trained on; None if the file doesn't say.
        val_top1: Its accuracy on the validation images of its training, in percent; None if the file doesn't say.
        notes: Sentences about what was read and how it was understood.
    """

    network: str
    num_classes: int
    statistics: Statistics
    state: dict[str, Tensor]
    path: Path
    network_args: dict[str, Any] = field(default_factory=dict)
    dataset: str = ""
    class_names: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    val_top1: float | None = None
    notes: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Return the network with its weights, in float32 and eval mode.

        Raises:
            UserError: If the weights don't fit the network that the file names.
        """
        module = build_network(self.network, self.num_classes, self.network_args)
        load_state(module, self.state, self.path)
        return module.eval()

    def for_classes(self, class_names: Sequence[str], dataset: str, role: str = "") -> "TrainedNetwork":
        """Return the network with its classes in the order of the data's labels, and a note if that says something.

        Args:
            class_names: Names of the data's classes by label, as many as the network has.
            dataset: Name of the data.
            role: What the network is, for messages, such as "the teacher ".

        Raises:
            UserError: If the network was trained on other classes.
        """
        if not self.class_names:
            unknown = f"{role}{self.path} doesn't name its classes: they are taken to be the data's, in the same order"
            return replace(self, notes=(*self.notes, unknown))
        what = f"{role}{self.path}" + (f", trained on {self.dataset}," if self.dataset else "")
        order = class_order(self.class_names, class_names, what, dataset)
        if order is None:
            return self
        theirs, ours = shorten_names(self.class_names), shorten_names(class_names)
        moved = f"{role}{self.path} has its classes in another order, {theirs}; they are put in the data's, {ours}"
        return replace(
            self,
            state=reorder_classes(self.network, self.state, torch.tensor(order), self.network_args),
            class_names=tuple(class_names),
            notes=(*self.notes, moved),
        )

    def origin(self, networks: str | None = None) -> str:
        """Return what the network is and where it comes from, in a line: network, data, validation accuracy.

        Args:
            networks: Names of all networks that were trained together, if there are several.
        """
        accuracy = "" if self.val_top1 is None else f", {self.val_top1:.2f} % in validation"
        return f"{networks or self.network}, trained on {self.dataset or 'data without a name'}{accuracy}"

    def metadata(self) -> dict[str, str]:
        """Return the metadata that a file made of this network holds; see `packed_metadata`."""
        return packed_metadata(
            self.network,
            self.num_classes,
            self.statistics,
            network_args=self.network_args,
            class_names=self.class_names,
            image_shape=self.image_shape,
            **({"dataset": self.dataset} if self.dataset else {}),
        )


def packed_metadata(
    network: str,
    num_classes: int,
    statistics: Statistics,
    *,
    network_args: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    image_shape: Sequence[int] | None = None,
    **more: str,
) -> dict[str, str]:
    """Return the metadata of a packed file, which say all that is needed to use its network.

    Args:
        network: Its name.
        num_classes: Width of its last layer; a decimal number in the file.
        statistics: Those of its inputs; two JSON lists, `mean` and `std`, in the file.
        network_args: Further arguments that it is built with; JSON in the file.
        class_names: Names of its classes in the order of its outputs; see `encode_names`.
        image_shape: Channels, height and width of its images; a JSON list in the file.
        **more: Further metadata.
    """
    optional = {
        "network_args": json.dumps(dict(network_args)) if network_args else "",
        "class_names": encode_names(class_names),
        "image_shape": json.dumps(list(image_shape)) if image_shape else "",
    }
    return {
        "network": network,
        "num_classes": str(num_classes),
        "mean": json.dumps(statistics.mean),
        "std": json.dumps(statistics.std),
        **{key: text for key, text in optional.items() if text},
        **more,
    }


def trained_on(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a `TrainedNetwork` that metadata hold, as far as they do and are understood."""
    try:
        shape = json.loads(metadata.get("image_shape", "null"))
        options = json.loads(metadata.get("network_args", "{}"))
    except ValueError:
        shape, options = None, {}
    is_shape = isinstance(shape, list) and len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape)
    return {
        "network_args": options if isinstance(options, dict) else {},
        "dataset": metadata.get("dataset", ""),
        "class_names": decode_names(metadata["class_names"]) if metadata.get("class_names") else (),
        "image_shape": tuple(shape) if is_shape else None,
    }


def state_dict_bytes(network: nn.Module, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a network's state dict as a safetensors file.

    Args:
        network: The network.
        metadata: What the file says of it, under one key, as safetensors writes several in random order.
    """
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    return save(state, {METADATA_KEY: json.dumps(dict(metadata))} if metadata else None)


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a network; only BatchNorm's step counters may be missing.

    Raises:
        UserError: If a key is missing or unexpected, or a shape differs.
    """
    grow_biases(module, state)
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    for problem, keys in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", shapes)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{path} does not fit the network: it {problem} {keys[0]}{more}; is it another network's?")
    module.load_state_dict({**own, **state})


def grow_biases(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add a bias of zeros to each layer that has none and gets one from `state`: moment matching adds biases."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None and f"{name}.bias" in state:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
