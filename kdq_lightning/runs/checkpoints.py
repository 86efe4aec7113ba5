"""Trained networks on disk: run folders, our checkpoints, packed files and state dicts become `TrainedNetwork`s."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from kdq_lightning.data.normalization import Channels, Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network, count_classes, find_network
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.quantization.packing import is_packed, unpack
from kdq_lightning.runs.records import identity, packed_path, read_records
from kdq_lightning.runs.versions import newest_finished


@dataclass(frozen=True)
class Description:
    """What a user says of a plain state dict, which says nothing of itself.

    Attributes:
        network: Name of its network.
        mean: Channel means of the network's inputs.
        std: Channel deviations of the network's inputs.
        flags: What the command line calls these three, for messages.
    """

    network: str | None = None
    mean: Channels | None = None
    std: Channels | None = None
    flags: tuple[str, str, str] = ("--network", "--mean", "--std")


@dataclass(frozen=True)
class TrainedNetwork:
    """A network's name, what it was trained on and its weights.

    Attributes:
        network: Its name in `networks.NETWORKS`.
        num_classes: Width of its last layer.
        statistics: Those of the inputs that it expects.
        state: Its state dict; it may hold biases that layers gained by quantization (see `grow_biases`).
        path: The file that it was read from.
    """

    network: str
    num_classes: int
    statistics: Statistics
    state: dict[str, Tensor]
    path: Path

    def build(self) -> nn.Module:
        """Return the network with its weights, in float32 and eval mode.

        Raises:
            UserError: If the weights don't fit the network that the file names.
        """
        module = build_network(self.network, self.num_classes)
        load_state(module, self.state, self.path)
        return module.eval()


def packed_metadata(network: str, num_classes: int, statistics: Statistics, **more: str) -> dict[str, str]:
    """Return the metadata of a packed file, which say all that is needed to use its network.

    Args:
        network: Its name in `networks.NETWORKS`.
        num_classes: Width of its last layer; a decimal number in the file.
        statistics: Those of its inputs; two JSON lists, `mean` and `std`, in the file.
        **more: Further metadata.
    """
    return {
        "network": network,
        "num_classes": str(num_classes),
        "mean": json.dumps(statistics.mean),
        "std": json.dumps(statistics.std),
        **more,
    }


def state_dict_bytes(network: nn.Module) -> bytes:
    """Return a network's state dict as a safetensors file."""
    return save({key: value.cpu().contiguous() for key, value in network.state_dict().items()})


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights into a network; only BatchNorm's step counters may be missing.

    Raises:
        UserError: If a key is missing or unexpected, or a shape differs.
    """
    grow_biases(module, state)
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    for problem, keys in (("lacks", missing), ("has the unknown", unexpected), ("has another shape for", shapes)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"{path} does not fit the network: it {problem} {keys[0]}{more}; is it another network's?")
    module.load_state_dict({**own, **state})


def grow_biases(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add a bias of zeros to each layer that has none and gets one from `state`: moment matching adds biases."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None and f"{name}.bias" in state:
            layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours with `weights_only=True`: no code in it can run.

    Raises:
        UserError: If the file is truncated, or not a checkpoint of this project.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:120]
        raise UserError(f"{path} cannot be read as a checkpoint ({reason}); it is truncated or foreign") from error
    if not isinstance(checkpoint, dict) or not {"networks", "data", "state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of kdq: it names no networks and no data")
    return checkpoint


def network_state(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the state dict of one of the networks in a checkpoint of ours, under the network's own keys."""
    prefix = checkpoint["networks"][name]["prefix"]
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def find_checkpoint(path: str | Path) -> Path:
    """Return the weights file that a path stands for: the file itself, or the best checkpoint of a run folder.

    A run folder holds versions; the newest finished one is taken. A version's own folder will do, too.

    Raises:
        UserError: If there is nothing at the path, or no finished version in it.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        hint = "" if path.suffix else f" (a run folder comes from `kdq fit --config configs/{path.name}.yaml`)"
        raise UserError(f"{path} does not exist: give a run folder, a checkpoint or a .safetensors file{hint}")
    if (path / "checkpoints").is_dir():
        return _best_of(path)
    finished = newest_finished(path)
    if finished is None:
        raise UserError(
            f"{path} holds no finished run: finish it with `--ckpt_path last`, or name one of its checkpoints"
        )
    return _best_of(finished)


def _best_of(version: Path) -> Path:
    """Return a version's best checkpoint; one that never validated (a few-steps limit) has only its last."""
    for name in ("best.ckpt", "last.ckpt"):
        if (version / "checkpoints" / name).is_file():
            return version / "checkpoints" / name
    raise UserError(f"{version} holds no checkpoint: train it again, or name another run")


def find_packed(path: str | Path, bits: int | None, method: str = DEFAULT_METHOD) -> Path:
    """Return the packed file that a path stands for.

    Args:
        path: The file itself, or a run folder, of whose newest finished version the first network's file is taken.
        bits: Bit width of the file in a run folder; of a file of mixed bits its budget in bytes.
        method: Method that made the file in a run folder.

    Raises:
        UserError: If there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if bits is None:
        raise UserError(f"{path} is a run folder: say which of its packed files is meant with --model.init_args.bits")
    if version := newest_finished(path):
        for record in read_records(version):
            if identity(record)[1:] == (method, bits) and packed_path(version, record).is_file():
                return packed_path(version, record)
    made_by = "" if method == DEFAULT_METHOD else f" made by {method}"
    raise UserError(f"{path} has no finished version with a packed file of {bits} bits{made_by}: quantize it first")


def load_trained(path: str | Path, described: Description = Description()) -> dict[str, TrainedNetwork]:
    """Read the trained networks that a path stands for, by name (`peer0`, ... for mutual learning, else the network's).

    Args:
        path: A run folder, a checkpoint of ours, a packed file, or a plain `.safetensors` state dict.
        described: What is known of the network; what a file says of itself comes before this.

    Raises:
        UserError: If nothing is there, it can't be read, or it says too little of itself.
    """
    file = find_checkpoint(path)
    if file.suffix == ".safetensors" or is_packed(file):
        trained = _from_safetensors(file, described)
        return {trained.network: trained}
    checkpoint = read_checkpoint(file)
    return {
        name: TrainedNetwork(
            entry["network"],
            checkpoint["data"]["num_classes"],
            checkpoint_statistics(checkpoint),
            network_state(checkpoint, name),
            file,
        )
        for name, entry in checkpoint["networks"].items()
    }


def checkpoint_statistics(checkpoint: Mapping[str, Any]) -> Statistics:
    """Return the statistics that the networks in a checkpoint of ours expect of their inputs."""
    return Statistics(checkpoint["data"]["mean"], checkpoint["data"]["std"])


def _from_safetensors(file: Path, described: Description) -> TrainedNetwork:
    state, metadata = unpack(file) if is_packed(file) else (_read_state_dict(file), {})
    network = metadata.get("network", described.network)
    mean, std = (_channels_in(file, metadata, name) or getattr(described, name) for name in ("mean", "std"))
    if network is None or mean is None or std is None:
        missing = [flag for flag, value in zip(described.flags, (network, mean, std), strict=True) if value is None]
        raise UserError(f"{file} says too little of its network: give {', '.join(missing)}")
    statistics = Statistics(mean, std)
    statistics.check(*described.flags[1:])
    find_network(network)
    try:
        num_classes = int(metadata["num_classes"]) if "num_classes" in metadata else count_classes(network, state)
    except ValueError as error:
        raise UserError(f"{file} cannot be used: {error}") from error
    return TrainedNetwork(network, num_classes, statistics, state, file)


def _read_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); it is truncated or foreign") from error


def _channels_in(file: Path, metadata: Mapping[str, str], name: str) -> Channels | None:
    """Return a mean or deviation that a packed file's metadata holds as a JSON list; None if it holds none."""
    if name not in metadata:
        return None
    try:
        return tuple(map(float, json.loads(metadata[name])))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the metadata of {file} has the {name} {metadata[name]!r}, not a JSON list of numbers"
        ) from error


def add_network_arguments(parser: ArgumentParser) -> None:
    """Add the options that describe a plain state dict to a command without a model."""
    parser.add_argument("--network", type=str | None, help="Name of a plain state dict's network.")
    parser.add_argument("--mean", type=float, nargs="+", help="Channel means of a plain state dict's inputs.")
    parser.add_argument("--std", type=float, nargs="+", help="Channel deviations of a plain state dict's inputs.")


def load_network(path: str | Path, options: Namespace) -> TrainedNetwork:
    """Read the trained network that a path stands for; of a run with several peers, the first one.

    Args:
        path: What `load_trained` takes.
        options: The values of `add_network_arguments`.

    Raises:
        UserError: If nothing is there, it can't be read, or it says too little of itself.
    """
    mean, std = (tuple(values) if values else None for values in (options.mean, options.std))
    return next(iter(load_trained(path, Description(options.network, mean, std)).values()))
