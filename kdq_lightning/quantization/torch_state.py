"""Saves and restores torch's global settings (autocast, inference mode, ...) for each paused forward.

A walk pauses many forwards at the same layer. What one of them has switched on until then must hold for itself alone:
it is put aside while the forward waits, and put back when it goes on.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

Setting = tuple[Callable[[], Any], Callable[[Any], object]]
"""How to read and how to write one setting."""


def _settings() -> list[Setting]:
    """Return every setting that can be read and written as a plain value; the order is that of writing."""
    native: Any = torch._C
    cuda: Any = torch.backends.cuda
    mha: Any = torch.backends.mha
    found: list[Setting] = [
        (torch.is_grad_enabled, native._set_grad_enabled),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        (torch.is_anomaly_enabled, native.set_anomaly_enabled),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (torch.are_deterministic_algorithms_enabled, native._set_deterministic_algorithms),
        (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
        (native._get_torch_function_state, native._set_torch_function_state),
    ]
    for device in AUTOCAST_DEVICES:
        found += [
            (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
            (partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
        ]
    for kernel in ("flash", "mem_efficient", "math", "cudnn"):
        found.append((getattr(cuda, f"{kernel}_sdp_enabled"), getattr(cuda, f"enable_{kernel}_sdp")))
    for name in ("enabled", "benchmark", "deterministic", "allow_tf32"):
        found.append((getattr(native, f"_get_cudnn_{name}"), getattr(native, f"_set_cudnn_{name}")))
    for name in ("mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled", "sdp_priority_order"):
        if hasattr(native, f"_get_{name}"):
            found.append((getattr(native, f"_get_{name}"), getattr(native, f"_set_{name}")))
    return [setting for setting in found if _readable(setting)]


def _readable(setting: Setting) -> bool:
    """Whether this build of torch has a setting: some raise on a build without their device."""
    try:
        setting[1](setting[0]())
    except (RuntimeError, TypeError):
        return False
    return True


_SETTINGS: list[Setting] = []


@dataclass(frozen=True)
class TorchState:
    """The state at one moment.

    Attributes:
        values: Of all settings, in their order.
        inference: Whether inference mode is on.
        function_modes: Length of the stack of function modes; the default device is one.
        dispatch_modes: Length of the stack of dispatch modes.
    """

    values: tuple[Any, ...]
    inference: bool
    function_modes: int
    dispatch_modes: int

    @staticmethod
    def now() -> "TorchState":
        """Return the state as it is."""
        if not _SETTINGS:
            _SETTINGS.extend(_settings())
        return TorchState(
            tuple(read() for read, _ in _SETTINGS),
            torch.is_inference_mode_enabled(),
            torch._C._len_torch_function_stack(),
            torch._C._len_torch_dispatch_stack(),
        )

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Put this state back for a while; then what was switched on since holds again."""
        current = TorchState.now()
        if current == self:
            yield
            return
        native: Any = torch._C
        function_modes = [
            native._pop_torch_function_stack() for _ in range(self.function_modes, current.function_modes)
        ]
        dispatch_modes = [
            native._pop_torch_dispatch_stack(None) for _ in range(self.dispatch_modes, current.dispatch_modes)
        ]
        try:
            with ExitStack() as stack:
                if current.inference != self.inference:
                    stack.enter_context(torch.inference_mode(self.inference))
                _write(self.values)
                try:
                    yield
                finally:
                    _write(current.values)
        finally:
            for mode in reversed(dispatch_modes):
                native._push_on_torch_dispatch_stack(mode)
            for mode in reversed(function_modes):
                native._push_on_torch_function_stack(mode)


def _write(values: tuple[Any, ...]) -> None:
    """Write the settings that differ."""
    for (read, write), value in zip(_SETTINGS, values, strict=True):
        if read() != value:
            write(value)


@contextmanager
def isolated() -> Iterator[None]:
    """Compute apart from the caller's state, and leave it as it was, whatever happens inside.

    Within, gradients, inference mode, autocast, compilation and the fused attention of `nn.TransformerEncoder`, which
    goes past its layers, are off.
    """
    state = TorchState.now()
    native: Any = torch._C
    try:
        with torch.inference_mode(False), torch.no_grad(), uncompiled():
            for device in AUTOCAST_DEVICES:
                torch.set_autocast_enabled(device, False)
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        _write(state.values)
        while native._len_torch_function_stack() > state.function_modes:  # left on by a forward
            native._pop_torch_function_stack()
        while native._len_torch_dispatch_stack() > state.dispatch_modes:
            native._pop_torch_dispatch_stack(None)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what `torch.compile` was told to compile as it is; a paused forward can't be traced."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled yet, and loading it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
