"""Forwards of one network on many small batches, all paused at the same layer until that layer is solved.

A layer is solved on all calibration images at once, but the network runs fastest, and in least memory, on few of them
at a time. So each small batch has a forward of its own, a coroutine that hands over its inputs wherever it comes to a
layer, and goes on with the outputs that it is given. The network itself needs to know nothing of this.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.gram import layers_of

PART_IMAGES = 64  # few enough that the activations of a layer stay in a processor's cache
PARTS = 4  # of fewer images, so that up to as many processes can share them and repeat the products of one
LARGE = 8e6  # bytes of a part's activations from which the heap's holes matter more than the time to close them


def part_images(total: int) -> int:
    """Return how many of all calibration images run at a time: a power of two, whatever the number of processes."""
    return min(PART_IMAGES, 1 << max(0, (total // PARTS).bit_length() - 1))


class Call(NamedTuple):
    """A layer that a forward has come to, and what it is given there."""

    name: str
    inputs: Tensor


class Forwards:
    """One forward for every stream of every part of the images.

    Attributes:
        layer: Name of the layer at which all forwards wait; None when they are through.
    """

    def __init__(self, network: nn.Module, parts: Sequence[Tensor], streams: int) -> None:
        """Run up to the first layer.

        Args:
            network: In eval mode; the forwards of its layers are replaced for good.
            parts: Images by part, (images, ...).
            streams: Forwards of each part.
        """
        for name, layer in layers_of(network).items():
            layer.forward = partial(_wait, name)  # type: ignore[method-assign]
        self._forwards = [[greenlet(network) for _ in range(streams)] for _ in parts]
        self._calls: list[list[Call]] = [
            [forward.switch(images) for forward in forwards]
            for forwards, images in zip(self._forwards, parts, strict=True)
        ]
        self.layer = self._agree()

    @property
    def inputs(self) -> list[list[Tensor]]:
        """What the layer is given, by part and stream."""
        return [[call.inputs for call in calls] for calls in self._calls]

    def resume(self, layers: Sequence[nn.Module]) -> None:
        """Give each stream the outputs of its own layer, and run on to the next one."""
        for forwards, calls in zip(self._forwards, self._calls, strict=True):
            for i, (forward, layer) in enumerate(zip(forwards, layers, strict=True)):
                outputs = layer(calls[i].inputs)
                calls[i] = forward.switch(outputs)
                if outputs.nbytes > LARGE:
                    give_back_memory()
        self.layer = self._agree()

    def _agree(self) -> str | None:
        pairs = zip(chain(*self._forwards), chain(*self._calls), strict=True)
        names = {None if forward.dead else call.name for forward, call in pairs}
        if len(names) > 1:
            raise UserError("the images decide which layer the model calls next: it can't be calibrated on all at once")
        return names.pop()


def _wait(name: str, input: Tensor) -> Tensor:
    """Stand in for a layer's forward, whose argument torch calls `input`."""
    walk = getcurrent().parent
    assert walk is not None
    outputs: Tensor = walk.switch(Call(name, input))
    return outputs


def give_back_memory() -> None:
    """Return freed memory to the system: between aligned blocks that live on, glibc's heap keeps holes as large."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
