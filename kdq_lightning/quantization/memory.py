"""How much memory the activations of a network take, measured on two images."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Activations:
    """Memory of one forward of the float network, in bytes an image.

    Attributes:
        image: The image itself.
        peak: The most that lives at a time.
        at_layer: What lives while each layer is called first, by name.
    """

    image: int
    peak: float
    at_layer: dict[str, float]


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storage of all tensors that operations return, for as long as each lives, and notes used parameters.

    Attributes:
        peak: The most bytes that lived at a time, without parameters and buffers.
        resolution: The coarsest relative spacing among the types of the numbers that were computed.
        inside: Names of the layers whose own forward is running, the innermost last.
        used_by: For each parameter's name, the layers in whose own forward it was used; "" stands for elsewhere.
    """

    def __init__(self, network: nn.Module) -> None:
        """Watch a network."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.resolution = 0.0
        self.inside: list[str] = []
        self.used_by: dict[str, set[str]] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in chain(network.parameters(), network.buffers())}
        self._parameters: dict[int, list[str]] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(parameter.untyped_storage()._cdata, []).append(name)
        self._sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation and note what it uses and returns."""
        for tensor in tensors_in((args, kwargs)):
            for name in self._parameters.get(_storage(tensor), ()):
                self.used_by.setdefault(name, set()).add(self.inside[-1] if self.inside else "")
        outputs = func(*args, **(kwargs or {}))
        for tensor in tensors_in(outputs):
            if tensor.is_floating_point():
                self.resolution = max(self.resolution, torch.finfo(tensor.dtype).eps)
            key = _storage(tensor)
            if key and key not in self._own:
                storage = tensor.untyped_storage()
                self._sizes[key] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, self.live())
        return outputs

    def live(self) -> int:
        """Return the bytes that live now."""
        gone = [key for key, (reference, _) in self._sizes.items() if reference.expired()]  # type: ignore[no-untyped-call]
        for key in gone:
            del self._sizes[key]
        return sum(size for _, size in self._sizes.values())


def _storage(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor; 0 for one that has none of its own, such as a sparse one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0
