"""The weights that torchvision and timm publish for their networks, fitted to another number of classes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from kdq_lightning.errors import UserError
from kdq_lightning.networks.catalogue import INCEPTIONS, TIMM, TORCHVISION, import_timm
from kdq_lightning.networks.class_rows import class_dimensions


class Published(NamedTuple):
    """Published weights.

    Attributes:
        state: A whole state dict of the network.
        mean: Channel means of the images in [0, 1] that the weights were trained on.
        std: Their channel deviations.
    """

    state: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def pretrained_state(
    name: str, network: nn.Module, num_classes: int, network_args: Mapping[str, Any] | None = None
) -> Published:
    """Return published weights for a network; where they have another number of classes, the last layer is a fresh one.

    torchvision's are those of `weights="DEFAULT"`, timm's those of its default tag or of the one in the name.

    Args:
        name: `torchvision/NAME` or `timm/NAME`.
        network: That network, freshly initialised.
        num_classes: Number of classes that it was built for.
        network_args: The other arguments that it was built with.

    Raises:
        UserError: If nobody publishes weights for the network, they can't be fetched, or they don't fit.
    """
    options = dict(network_args or {})
    if name.startswith(TORCHVISION):
        published = _from_torchvision(name.removeprefix(TORCHVISION))
    elif name.startswith(TIMM):
        published = _from_timm(name.removeprefix(TIMM), num_classes, options)
    else:
        raise UserError(
            f"nobody publishes weights of {name} that could be fetched: --model.init_args.pretrained belongs to"
            " torchvision/NAME and timm/NAME, and --model.init_args.weights takes a file"
        )
    own = network.state_dict()
    differing = [key for key in own if key not in published.state or published.state[key].shape != own[key].shape]
    of_classes = class_dimensions(name, options)
    if wrong := [key for key in differing if key not in of_classes]:
        raise UserError(
            f"the published weights of {name} don't fit {wrong[0]}: leave out --model.init_args.network_args or"
            " --model.init_args.pretrained"
        )
    return published._replace(state={key: own[key] if key in differing else published.state[key] for key in own})


def _from_torchvision(name: str) -> Published:
    choices = models.get_model_weights(name)
    if not len(choices):
        raise UserError(f"torchvision publishes no weights of {name}: leave out --model.init_args.pretrained")
    weights = choices.DEFAULT
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # no connection, a full disk, a damaged file
        place = f"{torch.hub.get_dir()}/checkpoints/{weights.url.rpartition('/')[2]}"
        raise UserError(
            f"torchvision's weights of {name} can't be fetched ({_first_line(error)}): put {weights.url} at {place}"
        ) from error
    if name in INCEPTIONS:  # whose published form turns ImageNet's statistics into these in its forward
        return Published(state, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    transforms = weights.transforms()
    return Published(state, tuple(transforms.mean), tuple(transforms.std))


def _from_timm(name: str, num_classes: int, options: Mapping[str, Any]) -> Published:
    timm = import_timm()
    try:
        with torch.random.fork_rng(devices=[]):  # the fresh last layer's draws
            trained = timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except Exception as error:  # no connection, no published weights, a damaged file
        raise UserError(
            f"timm's weights of {name} can't be had ({_first_line(error)}): connect to the network that has them, name"
            " another tag (`kdq list networks`), or leave out --model.init_args.pretrained"
        ) from error
    config = trained.pretrained_cfg
    return Published(trained.state_dict(), tuple(config["mean"]), tuple(config["std"]))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
