"""Writes and reads packed files: everything that inference needs, and almost nothing else.

A packed file is a safetensors file of three tensors: `.codes` (uint8, the codes of all layers, one layer after another,
packed into bits; a code is the index of a level), `.floats` (float32: per layer its scales; then biases, normalisation
and layers left float) and `.layout` (uint8, compressed JSON: which values belong to which layer). Tensors of any other
type lie beside them under their own names, which never start with a dot. A tensor for each bias would be simpler, but
its header entry takes more bytes than the bias: the header of a 2-bit ResNet-20 would be a tenth of the file.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.files import write_atomically
from kdq_lightning.quantization.bitstream import pack_codes, packed_size, unpack_codes
from kdq_lightning.quantization.codebooks import QuantizedWeight, grid
from kdq_lightning.quantization.gram import weight_name

_KEY = "kdq_packed"
_VERSION = 1
_ALIGNMENT = 8  # bytes to a multiple of which safetensors fills its header up


class _Layer(NamedTuple):
    """What the header says of a quantized layer, in the order of its JSON list.

    Attributes:
        codebook: Its name.
        bits: Nominal bit width.
        levels: Number of levels.
        shape: Of the weight.
        scales: Number of scales: 1, or one a channel.
        own_grid: Whether the levels follow the scales in `.floats`. The format allows it; codebooks give the levels of
            all files that are written now.
    """

    codebook: str
    bits: int
    levels: int
    shape: list[int]
    scales: int
    own_grid: bool


def save_packed(
    path: str | Path, model: nn.Module, weights: Mapping[str, QuantizedWeight], metadata: Mapping[str, str]
) -> None:
    """Write a quantized network as a packed file, whole or not at all.

    Args:
        path: The file; an old one is replaced only once the new one is complete. Missing folders are made.
        model: The quantized network. What isn't in `weights` is stored as it is (biases, normalisation, layers left
            float); `num_batches_tracked`, which inference never reads, is left out.
        weights: The quantized layers by module name.
        metadata: What a later reader should know (network, num_classes, mean, std, dataset, ...).

    Raises:
        UserError: If the file can't be written, or a layer's weight is no longer the one that was quantized.
    """
    for name, weight in weights.items():
        _check_unchanged(name, model, weight)
    content = _content(model, weights, metadata, lambda weight: pack_codes(weight.codes, weight.grid.numel()))
    write_atomically(Path(path), content)


def file_bytes(model: nn.Module, weights: Mapping[str, QuantizedWeight], metadata: Mapping[str, str]) -> int:
    """Return the size of the file that `save_packed` writes, in bytes; it doesn't depend on the codes."""
    return len(_content(model, weights, metadata, lambda weight: torch.zeros(_code_bytes(weight), dtype=torch.uint8)))


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """Return how many bytes metadata add to a packed file at most."""
    return len(json.dumps(json.dumps(dict(metadata)))) + _ALIGNMENT


def _content(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight],
    metadata: Mapping[str, str],
    pack: Callable[[QuantizedWeight], Tensor],
) -> bytes:
    """Return the content of a packed file; `pack` turns the codes of a layer into bytes."""
    own, aliases = _unique_state(model, first={weight_name(name) for name in weights})
    weights = {name: weight for name, weight in weights.items() if own.pop(weight_name(name), None) is not None}
    floats = {name: tensor for name, tensor in own.items() if tensor.dtype == torch.float32}
    scales = [weight.scale for weight in weights.values()]
    layout = {
        "layers": {name: _describe(weight) for name, weight in weights.items()},
        "floats": {name: list(tensor.shape) for name, tensor in floats.items()},
        "aliases": aliases,
    }
    tensors = {
        ".codes": _joined(map(pack, weights.values()), torch.uint8),
        ".floats": _joined([*scales, *floats.values()], torch.float32),
        ".layout": torch.frombuffer(bytearray(zlib.compress(json.dumps(layout).encode(), 9)), dtype=torch.uint8),
        **{name: tensor.detach().cpu().contiguous() for name, tensor in own.items() if name not in floats},
    }
    header = {"version": _VERSION, "metadata": dict(metadata), "checksum": _checksum(metadata, tensors)}
    # One metadata key only: safetensors writes several in random order, and equal networks shall give equal files.
    return safetensors.torch.save(tensors, {_KEY: json.dumps(header)})


def load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Load a packed file into a network of the same architecture: its outputs become the saved one's, to the bit.

    Args:
        path: A file that `save_packed` wrote.
        model: Changed in place, on the device where it is, and only once everything is known to fit. A layer built
            without bias that gained one by quantization gets it; tensors that were shared when saved are shared again.

    Returns:
        The model given.

    Raises:
        UserError: If the file is missing, truncated, altered, not a packed file, or of another network.
    """
    tensors, _ = _read(Path(path))
    values, aliases, layers = _decode(tensors)
    reason = _mismatch(model, values, aliases, layers)
    if reason:
        raise UserError(f"{path} holds another network than this {type(model).__name__}: {reason}")
    for name, value in values.items():
        _assign(model, name, value)
    for alias, name in aliases.items():
        owner, attribute = _owner(model, alias)
        setattr(owner, attribute, getattr(*_owner(model, name)))
    return model


def unpack(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a packed file without a network to put it in.

    Returns:
        The state dict, weights dequantized to float32, with the biases that layers gained; and the metadata.

    Raises:
        UserError: If the file is missing, truncated, altered, or not a packed file.
    """
    tensors, metadata = _read(Path(path))
    values, aliases, _ = _decode(tensors)
    return {**values, **{alias: values[name] for alias, name in aliases.items()}}, metadata


def read_weights(path: str | Path) -> dict[str, QuantizedWeight]:
    """Return the quantized weights of a packed file by layer, codes and scales.

    Raises:
        UserError: If the file is missing, truncated, altered, or not a packed file.
    """
    tensors, _ = _read(Path(path))
    return _split(tensors, _layout(tensors)[0])[0]


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata that `save_packed` was given.

    Raises:
        UserError: If the file is missing, truncated, altered, or not a packed file.
    """
    return _read(Path(path))[1]


def is_packed(path: str | Path) -> bool:
    """Tell a packed file from a plain state dict, by its header alone; False for what can't be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return _KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def packed_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes that a layer's weight takes in a packed file: codes and scales."""
    return _code_bytes(weight) + 4 * weight.scale.numel()


def mean_bits(weights: Iterable[QuantizedWeight]) -> float:
    """Return the bits that a quantized weight takes in a packed file, the mean over all; scales don't count."""
    weights = list({id(weight): weight for weight in weights}.values())  # layers may share one
    return 8 * sum(map(_code_bytes, weights)) / sum(weight.codes.numel() for weight in weights)


def _code_bytes(weight: QuantizedWeight) -> int:
    return packed_size(weight.codes.numel(), weight.grid.numel())


def _describe(weight: QuantizedWeight) -> _Layer:
    return _Layer(
        codebook=weight.codebook,
        bits=weight.bits,
        levels=weight.grid.numel(),
        shape=list(weight.codes.shape),
        scales=weight.scale.numel(),
        own_grid=False,
    )


def _check_unchanged(name: str, model: nn.Module, weight: QuantizedWeight) -> None:
    """Refuse a weight that is no longer the quantized one, or whose levels its codebook doesn't have."""
    if not torch.equal(grid(weight.codebook, weight.bits), weight.grid.cpu()):
        raise UserError(f"the levels of layer {name} are not those of codebook {weight.codebook!r}: name its codebook")
    current = model.get_parameter(weight_name(name))
    if not torch.equal(current, weight.dequantize().to(current)):
        raise UserError(f"the weight of layer {name} is not the one that was quantized: quantize the network again")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the network's parameters and buffers by every name they have, without the counters of BatchNorm."""
    state = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[2] != "num_batches_tracked"
    }
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} of {type(model).__name__} is not a tensor: packed files hold tensors only")
    return state


def _unique_state(model: nn.Module, first: set[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the state into tensors under one name each, `first` preferred, and aliases (their other names)."""
    state = _state(model)
    names: dict[int, str] = {}
    for name in sorted(state, key=lambda name: name not in first):
        names.setdefault(id(state[name]), name)
    own = {name: tensor for name, tensor in state.items() if names[id(tensor)] == name}
    aliases = {name: names[id(tensor)] for name, tensor in state.items() if name not in own}
    return own, aliases


def _joined(parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(part.detach().cpu().flatten() for part in parts)])


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Eight bytes over all that a file holds: one that was altered or damaged doesn't get past them."""
    digest = hashlib.blake2b(json.dumps(dict(metadata)).encode(), digest_size=8)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a packed file and verify that it is whole; return its tensors and its metadata."""
    if not path.is_file():
        raise UserError(f"there is no packed file {path}: check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it isn't a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}): write it again") from error
    if header is None:
        raise UserError(f"{path} is a safetensors file but not a packed one: save_packed didn't write it")
    try:
        content = json.loads(header)
        version, metadata, checksum = content["version"], content["metadata"], content["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a damaged header: write it again") from error
    if version != _VERSION:
        raise UserError(f"{path} has format {version} and this release reads {_VERSION}: use the release that wrote it")
    if checksum != _checksum(metadata, tensors):
        raise UserError(f"{path} was altered or damaged after it was written, its checksum is wrong: write it again")
    return tensors, metadata


def _decode(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, _Layer]]:
    """Turn a file's contents into the network's state by name, weights dequantized; aliases; the quantized layers."""
    layers, floats, aliases = _layout(tensors)
    values = {name: tensor for name, tensor in tensors.items() if not name.startswith(".")}
    weights, numbers = _split(tensors, layers)
    values |= {weight_name(name): weight.dequantize() for name, weight in weights.items()}
    for name, shape in floats.items():
        value, numbers = numbers.tensor_split([torch.Size(shape).numel()])
        values[name] = value.view(shape)
    return values, aliases, layers


def _layout(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Layer], dict[str, list[int]], dict[str, str]]:
    """Return the quantized layers, the shapes of the other numbers and the aliases."""
    layout = json.loads(zlib.decompress(tensors[".layout"].numpy().tobytes()))
    return {name: _Layer(*entry) for name, entry in layout["layers"].items()}, layout["floats"], layout["aliases"]


def _split(tensors: Mapping[str, Tensor], layers: Mapping[str, _Layer]) -> tuple[dict[str, QuantizedWeight], Tensor]:
    """Cut codes and numbers into the layers' weights; return them and the numbers that are left."""
    weights = {}
    codes, numbers = tensors[".codes"], tensors[".floats"]
    for name, layer in layers.items():
        count = torch.Size(layer.shape).numel()
        packed, codes = codes.tensor_split([packed_size(count, layer.levels)])
        scale, numbers = numbers.tensor_split([layer.scales])
        levels, numbers = numbers.tensor_split([layer.levels * layer.own_grid])
        weights[name] = QuantizedWeight(
            codes=unpack_codes(packed, count, layer.levels).view(layer.shape),
            grid=levels if layer.own_grid else grid(layer.codebook, layer.bits),
            scale=scale,
            codebook=layer.codebook,
            bits=layer.bits,
        )
    return weights, numbers


def _mismatch(
    model: nn.Module, values: Mapping[str, Tensor], aliases: Mapping[str, str], layers: Mapping[str, _Layer]
) -> str:
    """Say why a file doesn't fit a network; empty if it does."""
    state = _state(model)
    stored = {**values, **{alias: values[name] for alias, name in aliases.items()}}
    quantized = {weight_name(name) for name in layers}
    quantized |= {alias for alias, name in aliases.items() if name in quantized}

    def is_gained_bias(name: str) -> bool:
        module, _, attribute = name.rpartition(".")
        weight = weight_name(module)
        return (
            attribute == "bias"
            and weight in quantized
            and weight in state
            and getattr(*_owner(model, name), model) is None
        )

    missing = [name for name in state if name not in stored]
    unexpected = [name for name in stored if name not in state and not is_gained_bias(name)]
    if missing or unexpected:
        absent = f"the file lacks {len(missing)} of its tensors, first {missing[0]}" if missing else ""
        foreign = f"the file has {len(unexpected)} tensors that it lacks, first {unexpected[0]}" if unexpected else ""
        return " and ".join(part for part in (absent, foreign) if part)
    for name, tensor in state.items():
        if stored[name].shape != tensor.shape:
            return f"{name} has shape {tuple(stored[name].shape)} in the file and {tuple(tensor.shape)} in the network"
    return ""


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and the tensor's name there."""
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a value into the network as a tensor of its own, on the device and in the memory format of the old one."""
    owner, attribute = _owner(model, name)
    old = getattr(owner, attribute)
    if old is None:
        assert isinstance(owner.weight, Tensor)
        setattr(owner, attribute, nn.Parameter(value.to(owner.weight)))
        return
    new = torch.empty_like(old.detach()).copy_(value)
    setattr(owner, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
