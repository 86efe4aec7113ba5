"""Trained networks on disk: run folders, our checkpoints, packed files and state dicts become `TrainedNetwork`s."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from kdq_lightning.data.normalization import Channels, Statistics
from kdq_lightning.errors import UserError
from kdq_lightning.networks import count_classes, find_network, state_shapes
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.quantization.packing import is_packed, unpack
from kdq_lightning.runs.records import identity, packed_path, read_records
from kdq_lightning.runs.state_dicts import read_plain_file, read_torch_file, strip_prefixes
from kdq_lightning.runs.trained_network import Description, TrainedNetwork, trained_on
from kdq_lightning.runs.versions import newest_finished

_NOTHING_SAID = Description()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours with `weights_only=True`: no code in it can run.

    Raises:
        UserError: If the file is truncated, or not a checkpoint of this project.
    """
    checkpoint = read_torch_file(path)
    if not is_our_checkpoint(checkpoint):
        raise UserError(f"{path} is not a checkpoint of kdq: it names no networks and no data")
    return checkpoint


def is_our_checkpoint(content: object) -> TypeGuard[dict[str, Any]]:
    """Return whether what a file holds is a checkpoint of this project."""
    return isinstance(content, dict) and {"networks", "data", "state_dict"} <= content.keys()


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
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        hint = "" if path.suffix else f" (a run folder comes from `kdq fit --config configs/{path.name}.yaml`)"
        raise UserError(f"{path} does not exist: give a run folder, a checkpoint or a state dict{hint}")
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
    path = Path(path).expanduser()
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


def load_trained(path: str | Path, described: Description = _NOTHING_SAID) -> dict[str, TrainedNetwork]:
    """Read the trained networks that a path stands for, by name (`peer0`, ... for mutual learning, else the network's).

    Args:
        path: A run folder, a checkpoint of ours, a packed file, or a plain state dict.
        described: What is known of the network; what a file says of itself comes before this.

    Raises:
        UserError: If nothing is there, it can't be read, it says too little of itself, or it names code to import.
    """
    file = find_checkpoint(path)
    if is_packed(file):
        trained = _from_packed(file, described)
        return {trained.network: trained}
    content = None if file.suffix == ".safetensors" else read_torch_file(file)
    if is_our_checkpoint(content):
        return _from_checkpoint(file, content, described)
    trained = _from_plain(file, content, described)
    return {trained.network: trained}


def checkpoint_statistics(checkpoint: Mapping[str, Any]) -> Statistics:
    """Return the statistics that the networks in a checkpoint of ours expect of their inputs."""
    return Statistics(checkpoint["data"]["mean"], checkpoint["data"]["std"])


def _from_checkpoint(file: Path, content: dict[str, Any], described: Description) -> dict[str, TrainedNetwork]:
    data, found = content["data"], {}
    for name, entry in content["networks"].items():
        network_args = dict(entry.get("network_args") or {})
        described.check_may_build(file, entry["network"], network_args)
        found[name] = TrainedNetwork(
            entry["network"],
            data["num_classes"],
            checkpoint_statistics(content),
            network_state(content, name),
            file,
            network_args=network_args,
            dataset=data.get("dataset", ""),
            class_names=tuple(data.get("class_names", ())),
            image_shape=data.get("image_shape"),
            val_top1=entry.get("val_top1"),
        )
    return found


def _from_packed(file: Path, described: Description) -> TrainedNetwork:
    state, metadata = unpack(file)
    more = trained_on(metadata)
    network, statistics = _named(file, metadata, described)
    described.check_may_build(file, network, more["network_args"])
    find_network(network)
    try:
        counted = "num_classes" in metadata
        num_classes = int(metadata["num_classes"]) if counted else count_classes(network, state, more["network_args"])
    except ValueError as error:
        raise UserError(f"{file} cannot be used: {error}") from error
    return TrainedNetwork(network, num_classes, statistics, state, file, val_top1=_recorded_accuracy(file), **more)


def _from_plain(file: Path, content: object, described: Description) -> TrainedNetwork:
    """Return what a state dict and the user together say; of the data, what our own export says."""
    plain = read_plain_file(file, content)
    network, statistics = _named(file, {}, described)
    network_args = dict(described.network_args or {})
    state = strip_prefixes(plain.state, state_shapes(network, 2, network_args).keys())
    try:
        num_classes = count_classes(network, state, network_args)
    except UserError as error:
        raise UserError(f"{file} cannot be used: {error}") from error
    more = trained_on(plain.metadata) | {"network_args": network_args, "notes": plain.notes}
    return TrainedNetwork(network, num_classes, statistics, state, file, **more)


def _named(file: Path, metadata: Mapping[str, str], described: Description) -> tuple[str, Statistics]:
    """Return a network's name and statistics: what the file says, else what the user says."""
    network = metadata.get("network", described.network)
    mean, std = (_channels_in(file, metadata, name) or getattr(described, name) for name in ("mean", "std"))
    if network is None or mean is None or std is None:
        missing = [flag for flag, value in zip(described.flags, (network, mean, std), strict=True) if value is None]
        raise UserError(f"{file} says too little of its network: give {', '.join(missing)}")
    statistics = Statistics(mean, std)
    statistics.check(*described.flags[1:])
    return network, statistics


def _recorded_accuracy(file: Path) -> float | None:
    """Return the validation accuracy, in percent, in the records of the run that a packed file lies in."""
    version = file.parent.parent
    with suppress(UserError):
        for record in read_records(version):
            if packed_path(version, record) == file:
                return record.val_top1
    return None


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
    parser.add_argument("--network", type=str | None, help="Name of a plain state dict's network, or of your own.")
    parser.add_argument("--network_args", type=dict | None, default=None, help="Further arguments of that network.")
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
    return next(
        iter(load_trained(path, Description(options.network, mean, std, network_args=options.network_args)).values())
    )
