"""Plain state dicts as people save them: `.safetensors`, or whatever `torch.save` wrote, often wrapped and prefixed."""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from kdq_lightning.errors import UserError

WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "ema", "model_ema", "state_dict_ema")
"""Keys under which training scripts save a state dict, those first that are taken if a file has several."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What wrappers put before every name: DataParallel, torch.compile, other people's LightningModules."""

METADATA_KEY = "kdq"  # of our exports: what their network was trained on, as JSON


class PlainFile(NamedTuple):
    """What a file without a network's description holds.

    Attributes:
        state: The state dict.
        metadata: What our own export says of it; nothing of other files.
        notes: Sentences about what was chosen.
    """

    state: dict[str, Tensor]
    metadata: dict[str, str]
    notes: tuple[str, ...]


def read_torch_file(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    """Read a file of `torch.save` with `weights_only=True`: no code in it can run.

    Besides tensors and plain data it may hold `argparse.Namespace`, in which training scripts keep their options.

    Raises:
        UserError: If the file is truncated, no file of torch, or holds Python objects.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch wraps whatever the unpickler meets
        message = str(error)
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", message)):
            what = f"a pickled {found[1]}"
        elif "TorchScript" in message:
            what = "a TorchScript program"
        else:
            reason = message.strip().partition("\n")[0][:120]
            raise UserError(f"{path} cannot be read as a checkpoint ({reason}); it is truncated or foreign") from error
        raise UserError(
            f"{path} holds {what}, and reading it could run code: where it comes from, save the weights alone,"
            ' torch.save(network.state_dict(), "weights.pth")'
        ) from error


def read_plain_file(path: Path, content: object = None) -> PlainFile:
    """Read a state dict, unwrapped.

    Args:
        path: The file.
        content: What `read_torch_file` returned of it; None to read it here.

    Raises:
        UserError: If the file can't be read, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it isn't a mapping)
                return PlainFile(state, _metadata((file.metadata() or {}).get(METADATA_KEY)), ())
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); it is truncated or foreign") from error
    inner = content if content is not None else read_torch_file(path)
    notes: list[str] = []
    while not _is_state_dict(inner):
        found = [key for key in WRAPPERS if isinstance(inner, Mapping) and isinstance(inner.get(key), Mapping)]
        if not found:
            keys = ", ".join(map(str, list(inner)[:6])) if isinstance(inner, Mapping) else type(inner).__name__
            raise UserError(
                f"{path} holds no state dict, on its own or under {', '.join(WRAPPERS)}, but {keys or 'nothing'}: save"
                ' one with torch.save(network.state_dict(), "weights.pth")'
            )
        if len(found) > 1:
            notes.append(f"its {found[0]} is taken, not its {', '.join(found[1:])}")
        assert isinstance(inner, Mapping)
        inner = inner[found[0]]
    assert isinstance(inner, Mapping)
    return PlainFile(dict(inner), _metadata(getattr(inner, METADATA_KEY, None)), tuple(notes))


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


def _metadata(text: object) -> dict[str, str]:
    """Return what our export wrote beside the weights; nothing if it is not ours or damaged."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def strip_prefixes(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes that hide the names of its network, if it fits better without them.

    Args:
        state: The state dict. An averaged model's counter, `n_averaged`, is dropped.
        expected: Names in the network's state dict.
    """
    best = now = dict(state)
    while True:
        now = {key: value for key, value in now.items() if key != "n_averaged" or key in expected}
        if sum(key in expected for key in now) > sum(key in expected for key in best):
            best = now
        prefix = next((prefix for prefix in PREFIXES if now and all(key.startswith(prefix) for key in now)), None)
        if prefix is None:
            return best
        now = {key.removeprefix(prefix): value for key, value in now.items()}
