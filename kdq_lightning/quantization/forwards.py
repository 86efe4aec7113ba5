"""Forwards of one network on many small batches, all paused at the same layer until that layer is solved.

A layer is solved on all calibration images at once, but the network runs fastest, and in least memory, on few of them
at a time. So each small batch has a forward of its own, a coroutine that hands over its inputs wherever it comes to a
layer, is given the layer to call in its place, and goes on. The network itself needs to know nothing of this.
"""

import contextvars
import copy
import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.torch_state import TorchState

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

    def __init__(
        self,
        network: nn.Module,
        names: Iterable[str],
        parts: Sequence[Tensor],
        streams: int,
        *,
        own_copies: bool = False,
        clone_images: bool = False,
    ) -> None:
        """Run up to the first layer.

        Args:
            network: In eval mode; the forwards of the layers named are replaced for good.
            names: Layers to pause at; all others run as they are.
            parts: Images by part, (images, ...).
            streams: Forwards of each part.
            own_copies: Give every forward a copy of the network, which shares the tensors: one that keeps activations
                in its attributes between layers needs it.
            clone_images: Give every forward images of its own: a network that changes its input needs it.
        """
        state = TorchState.now()
        for name in names:
            network.get_submodule(name).forward = partial(_wait, name, state)
        self._forwards = [
            [greenlet(share_tensors(network) if own_copies else network) for _ in range(streams)] for _ in parts
        ]
        self._calls: list[list[Call]] = [[] for _ in parts]
        try:
            for forwards, calls, images in zip(self._forwards, self._calls, parts, strict=True):
                for forward in forwards:
                    forward.gr_context = contextvars.copy_context()
                    calls.append(forward.switch(images.clone() if clone_images else images))
            self.layer = self._agree()
        except BaseException:
            self.close()
            raise

    @property
    def inputs(self) -> list[list[Tensor]]:
        """What the layer is given, by part and stream."""
        return [[call.inputs for call in calls] for calls in self._calls]

    @property
    def outputs(self) -> list[list[object]]:
        """What the network returned, by part and stream, once all are through."""
        return [list(calls) for calls in self._calls]

    def resume(self, layers: Sequence[nn.Module]) -> None:
        """Let each stream call its own layer, and run on to the next one."""
        for forwards, calls in zip(self._forwards, self._calls, strict=True):
            for i, (forward, layer) in enumerate(zip(forwards, layers, strict=True)):
                calls[i] = forward.switch(layer)
                if not forward.dead and calls[i].inputs.nbytes > LARGE:
                    give_back_memory()
        self.layer = self._agree()

    def close(self) -> None:
        """End the forwards that still wait, so that each leaves its contexts now and not when it is collected."""
        for forward in chain(*self._forwards):
            for _ in range(100):  # a forward may catch what ends it, and come to another layer
                if not forward or forward.dead:
                    break
                forward.throw(GreenletExit)

    def _agree(self) -> str | None:
        pairs = zip(chain(*self._forwards), chain(*self._calls), strict=True)
        names = {None if forward.dead else call.name for forward, call in pairs}
        if len(names) > 1:
            raise UserError("the images decide which layer the model calls next: it can't be calibrated on all at once")
        return names.pop()


def _wait(name: str, outside: TorchState, input: Tensor) -> Tensor:
    """Stand in for a layer's forward, whose argument torch calls `input`.

    The layer that the walk hands over is called without its hooks, which those of the layer replaced surround, and in
    the state that this forward has set up here.
    """
    walk = getcurrent().parent
    if walk is None:
        raise UserError(f"the model calls layer {name} in a thread of its own: it can't be calibrated")
    with outside.put_back():
        layer = walk.switch(Call(name, input))
    return own_forward(layer, input)


def own_forward(layer: nn.Module, *args: object, **kwargs: object) -> Tensor:
    """Call the forward of a layer's class, without hooks and whatever stands in for it on the instance."""
    forward: Callable[..., Tensor] = type(layer).forward
    return forward(layer, *args, **kwargs)


def share_tensors(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers are those of the original."""
    tensors = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def give_back_memory() -> None:
    """Return freed memory to the system: between aligned blocks that live on, glibc's heap keeps holes as large."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
