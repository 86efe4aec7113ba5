"""Which networks there are, by name, and how each is built.

A name is one of `NETWORKS`, `torchvision/NAME`, `timm/NAME`, or the import path of anything that can be called with
`num_classes` and returns an `nn.Module`, such as `my_package.nets.build`.
"""

import copy
import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from kdq_lightning.errors import UserError
from kdq_lightning.networks.cifar import NarrowResNet, wide_resnet


class Network(NamedTuple):
    """What the project knows of a network.

    Attributes:
        build: Builds it, freshly initialised, for a number of classes, its keyword argument `num_classes`.
        hint_layer: Name of the layer whose output hints are taken from if the user names none; None if there is no
            such layer.
    """

    build: Callable[..., nn.Module]
    hint_layer: str | None = None


NETWORKS = {
    "resnet18": Network(partial(wide_resnet, BasicBlock, [2, 2, 2, 2]), hint_layer="layer2"),
    "resnet34": Network(partial(wide_resnet, BasicBlock, [3, 4, 6, 3]), hint_layer="layer2"),
    "resnet50": Network(partial(wide_resnet, Bottleneck, [3, 4, 6, 3]), hint_layer="layer2"),
    **{
        f"resnet{depth}": Network(partial(NarrowResNet, depth), hint_layer="layer2")
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
}

TORCHVISION, TIMM = "torchvision/", "timm/"

INCEPTIONS = ("googlenet", "inception_v3")
_WITHOUT_SECOND_HEADS = {"aux_logits": False, "transform_input": False, "init_weights": True}
"""Arguments of torchvision's Inceptions: with auxiliary heads they return more than logits while they train."""

LOADING = ("pretrained", "weights", "checkpoint", "cache_dir")
"""How arguments begin that would make torchvision or timm read a file or fetch one."""


def network_names() -> Iterator[str]:
    """Yield every name that is listed: the project's own networks, torchvision's, and timm's if it is installed."""
    yield from NETWORKS
    yield from (TORCHVISION + name for name in _torchvision_names())
    if importlib.util.find_spec("timm"):
        yield from (TIMM + name for name in sorted(_timm_names()))


def is_listed(name: str) -> bool:
    """Return whether a name is the project's own or in torchvision's or timm's list, so that a file may use it.

    An import path is not listed: it is followed only if the user gives it, never because a file does.
    """
    if name.startswith(TIMM) and importlib.util.find_spec("timm"):
        return name.removeprefix(TIMM) in _timm_names()
    return name in NETWORKS or (name.startswith(TORCHVISION) and name.removeprefix(TORCHVISION) in _torchvision_names())


def find_network(name: str) -> Network:
    """Return what is known of a network. An import path is imported.

    Raises:
        UserError: If the name is unknown, timm is missing, or the import fails.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith(TORCHVISION):
        known = name.removeprefix(TORCHVISION)
        _check_known(known, _torchvision_names(), "torchvision")
        return Network(partial(_build_torchvision, known))
    if name.startswith(TIMM):
        known = name.removeprefix(TIMM)
        _check_known(known, _timm_names(), "timm")
        return Network(partial(import_timm().create_model, known))
    if "." in name and "/" not in name and ":" not in name:
        return Network(_import(name))
    raise UserError(
        f"unknown network {name!r}: choose one of {', '.join(NETWORKS)}, torchvision/NAME, timm/NAME (`kdq list"
        " networks` has them all), or the import path of a function with the argument num_classes"
    )


def build_network(name: str, num_classes: int, network_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a freshly initialised network that maps normalised images (batch, channels, h, w) to logits.

    Args:
        name: Its name; see the module's docstring.
        num_classes: Width of the last layer.
        network_args: Further arguments of the network, plain data.

    Raises:
        UserError: If the name is unknown, num_classes is below 2, or the network can't be built like that.
    """
    entry, options = find_network(name), dict(network_args or {})
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {num_classes}")
    if "num_classes" in options:
        raise UserError("network_args holds num_classes, which is counted from the data: leave it out")
    if loading := [key for key in options if is_listed(name) and key.startswith(LOADING)]:
        raise UserError(
            f"network_args holds {loading[0]}, which would load weights: give --model.init_args.pretrained true or"
            " --model.init_args.weights instead"
        )
    try:
        network = entry.build(num_classes=num_classes, **options)
    except Exception as error:  # code of others, which raises what it likes
        reason = str(error).strip().partition("\n")[0]
        given = f" and {options}" if options else ""
        raise UserError(
            f"the network {name} can't be built with num_classes={num_classes}{given}"
            f" ({type(error).__name__}: {reason}): look at its arguments, and give others with"
            " --model.init_args.network_args"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} gives a {type(network).__name__}, not a torch.nn.Module: name another network")
    return network


@torch.no_grad()
def check_images(name: str, network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Try a network on two images, in training and in evaluation. The network stays as it is.

    Args:
        name: Of the network, for messages.
        network: On the CPU.
        image_shape: Channels, height and width of an image in pixels.
        num_classes: Number of classes.

    Raises:
        UserError: If the network can't take such images, or doesn't return a tensor of logits (batch, classes).
    """
    trial, images = copy.deepcopy(network), torch.zeros(2, *image_shape)
    shape = " x ".join(map(str, image_shape))
    for is_training in (True, False):
        try:
            with torch.random.fork_rng(devices=[]):
                logits = trial.train(is_training)(images)
        except Exception as error:  # code of others, which raises what it likes
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{name} can't take images of {shape} ({type(error).__name__}: {reason}): give --data.image_size where"
                " the data have one, or other --model.init_args.network_args"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"{name} must map 2 images of {shape} to logits of shape (2, {num_classes}), and gives {found}: name"
                " a classifier, or give other --model.init_args.network_args"
            )


def _check_known(name: str, known: frozenset[str], library: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=3)
        raise UserError(
            f"unknown network '{library}/{name}': {library} lists no such classifier"
            + (f", but {', '.join(close)}" if close else "")
            + f"; `kdq list networks` names all of {library}'s"
        )


@cache
def _torchvision_names() -> frozenset[str]:
    return frozenset(models.list_models(module=models))


@cache
def _timm_names() -> frozenset[str]:
    timm = import_timm()
    return frozenset([*timm.list_models(), *timm.list_pretrained()])


def import_timm() -> Any:  # noqa: ANN401 - a module
    """Return timm, which takes seconds to import and is an extra.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f'timm\'s networks need timm ({error}): pip install "kdq-lightning[timm]"') from error


def _build_torchvision(name: str, num_classes: int, **options: Any) -> nn.Module:
    if name in INCEPTIONS:
        options = _WITHOUT_SECOND_HEADS | options
    network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network


def _import(path: str) -> Callable[..., nn.Module]:
    """Return what an import path leads to; commands find modules in the folder that they run in, too.

    Raises:
        UserError: If nothing is there, or it can't be called.
    """
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"the network {path} can't be imported ({error}): name a function or class as PACKAGE.MODULE.NAME, and run"
            " the command in the folder that holds it, or install it"
        ) from error
    if not callable(found):
        raise UserError(f"the network {path} is a {type(found).__name__}, which can't be called: name a function")
    return found  # type: ignore[no-any-return]
