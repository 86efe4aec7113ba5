"""Which numbers of a state dict belong to which class: where the last layer is, in any network."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdq_lightning.errors import UserError
from kdq_lightning.networks.catalogue import build_network


def count_classes(name: str, state: Mapping[str, Tensor], network_args: Mapping[str, Any] | None = None) -> int:
    """Return the number of classes of a network's state dict.

    Args:
        name: Of the network.
        state: The state dict.
        network_args: Further arguments of the network.

    Raises:
        UserError: If the name is unknown, no layer of the network depends on the number of classes, or the state dict
            has no such layer.
    """
    dimensions = class_dimensions(name, network_args)
    if not dimensions:
        raise UserError(f"a state dict of {name} doesn't say how many classes there are, as none of its shapes does")
    key, dimension = next(iter(dimensions.items()))
    if key not in state or state[key].ndim <= dimension:
        layer = key.rpartition(".")[0]
        raise UserError(f"the state dict holds no layer {layer}, which a {name} ends with: is it another network's?")
    return state[key].shape[dimension]


def reorder_classes(
    name: str, state: Mapping[str, Tensor], order: Tensor, network_args: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return a network's state dict with its classes in another order.

    Args:
        name: Of the network.
        state: The state dict; it may hold a bias that the last layer gained by quantization.
        order: int64, (classes,): the present place of each class of the new order.
        network_args: Further arguments of the network.
    """
    dimensions = class_dimensions(name, network_args)
    gained = {key.removesuffix("weight") + "bias": 0 for key, dimension in dimensions.items() if dimension == 0}
    dimensions = gained | dimensions
    return {
        key: value.index_select(dimensions[key], order) if key in dimensions else value for key, value in state.items()
    }


def class_dimensions(name: str, network_args: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Return which dimension counts the classes, of each entry of a network's state dict that has such a dimension.

    Found by building the network for two numbers of classes.
    """
    few, more = (state_shapes(name, count, network_args) for count in (3, 5))
    return {
        key: dimension
        for key, shape in few.items()
        for dimension, size in enumerate(shape)
        if (size, more[key][dimension]) == (3, 5)
    }


def state_shapes(name: str, num_classes: int, network_args: Mapping[str, Any] | None = None) -> dict[str, torch.Size]:
    """Return the shapes of a network's state dict by name, at little cost; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                network = build_network(name, num_classes, network_args)
        except UserError:  # some networks compute while they are built, which needs numbers
            network = build_network(name, num_classes, network_args)
    return {key: value.shape for key, value in network.state_dict().items()}
