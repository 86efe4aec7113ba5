"""What a network does with two images, before it is walked on: whether it can be, and how much memory that takes."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.forwards import PART_IMAGES
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.recipes import Recipe
from kdq_lightning.quantization.solution import working_bytes


@dataclass
class Profile:
    """Memory of one forward of the float network, in bytes an image.

    Attributes:
        image: The image itself.
        peak: The most that lives at a time.
        at_layer: What lives while each layer is solved, by name.
        channels_last: Whether the network runs on activations in that format, in which patches are gathered faster.
    """

    image: int
    peak: float
    at_layer: dict[str, float]
    channels_last: bool

    def walk_bytes(self, model: nn.Module, recipes: Sequence[Recipe], images: int) -> float:
        """Return the memory that a walk over all these recipes at once takes at its peak."""
        layers = layers_of(model)
        stacked = images * (1 + len(recipes))
        solving = (live * stacked + working_bytes(layers[name], recipes) for name, live in self.at_layer.items())
        return images * self.image + PART_IMAGES * self.peak + max(solving)


def probe(model: nn.Module, images: Tensor) -> Profile:
    """Run a copy of the network on the first two calibration images (or the only one, twice).

    Raises:
        UserError: If in eval mode the network changes its buffers, isn't deterministic, or mixes the images of a batch.
    """
    pair = torch.cat([images, images])[:2]
    if pair.dim() == 4:
        try:
            return _probe(model, pair.contiguous(memory_format=torch.channels_last), channels_last=True)
        except RuntimeError:  # a `view` that wants contiguous activations
            pass
    return _probe(model, pair, channels_last=False)


@torch.no_grad()
def _probe(model: nn.Module, pair: Tensor, *, channels_last: bool) -> Profile:
    network = copy.deepcopy(model).eval()
    meter = _Meter()
    for name, layer in layers_of(network).items():
        layer.register_forward_pre_hook(partial(meter.note, name))
    with meter:
        both = _tensors(network(pair))
    _check_buffers(model, network)
    again, alone = _tensors(network(pair)), _tensors(network(pair[:1]))
    if not all(map(_close, both, again)):
        raise UserError("the model gives other outputs for the same images in eval mode: make it deterministic")
    if not all(_close(whole[: len(part)], part) for whole, part in zip(both, alone, strict=True)):
        raise UserError("the model mixes the images of a batch in eval mode: it can't be calibrated image by image")
    image = pair[0].numel() * pair.element_size()
    return Profile(image, meter.peak / 2, {name: live / 2 for name, live in meter.live_at.items()}, channels_last)


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs agree but for the order of sums; those that aren't finite are left to the walk to place."""
    size = float(b.abs().max()) if b.numel() else 0.0
    return not math.isfinite(size) or torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size)


def _check_buffers(before: nn.Module, after: nn.Module) -> None:
    for (name, old), new in zip(before.named_buffers(), after.buffers(), strict=True):
        if not torch.equal(old, new):
            raise UserError(f"the model changes {name} in eval mode, so a walk would not see what inference sees")


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storage of all tensors that operations return, for as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.live_at: dict[str, int] = {}
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        outputs = func(*args, **(kwargs or {}))
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._sizes[storage._cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self._live())
        return outputs

    def note(self, name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        """Remember what lives when a layer is called."""
        self.live_at.setdefault(name, self._live())

    def _live(self) -> int:
        gone = [key for key, (reference, _) in self._sizes.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._sizes[key]
        return sum(size for _, size in self._sizes.values())
