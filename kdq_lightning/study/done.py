"""Which runs of a study have their records already."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from kdq_lightning.quantization.methods import choose_methods
from kdq_lightning.runs.records import FLOAT_BITS, Record, find_records, identity
from kdq_lightning.study.provenance import is_outdated
from kdq_lightning.study.run import Run


def find_done(runs: Sequence[Run], places: Sequence[Path]) -> dict[Run, list[Path]]:
    """Return the runs that have all their records below the given folders, with the folders of these records.

    Records belong to a run if config hash and seed are equal, so they may come from another machine or study. They do
    not count if the weights that the run learned from were trained again since, or if a run that needs this one would
    read a newer version.

    Args:
        runs: All runs of the study.
        places: Folders that are searched.

    Raises:
        UserError: If an option of a run is unknown or malformed.
    """
    records: defaultdict[tuple[str, int | None], dict[Path, list[Record]]] = defaultdict(dict)
    for folder, found in find_records(*places).items():
        for record in found:
            records[record.config_hash, record.seed].setdefault(folder, []).append(record)
    hashes: dict[str, tuple[str, list[tuple[str, int]], int]] = {}  # the same for every seed of a run
    done: dict[Run, list[Path]] = {}
    needed = {(name, run.seed) for run in runs for name in run.needs}
    for run in runs:
        if run.name not in hashes:
            settings = run.read_settings(run.arguments)
            model = settings.config["model"]["init_args"]
            quantization = settings.config["quantization"]
            methods = choose_methods(quantization["methods"], quantization["solver"], quantization["codebook"])
            rows = [("", FLOAT_BITS), *((method, bits) for method in methods for bits in quantization["bits"])]
            # A network that was quantized before training is recorded at its own bit width alone.
            wanted = [] if model.get("packed") else rows
            hashes[run.name] = settings.config_hash, wanted, len(model.get("networks") or [None])
        config_hash, wanted, networks = hashes[run.name]
        folders = [
            folder
            for folder, found in records[config_hash, run.seed].items()
            if _is_complete(found, _wanted_in(folder, run, wanted), networks) and not is_outdated(run, folder)
        ]
        if folders and ((run.name, run.seed) not in needed or run.finished in (None, *folders)):
            done[run] = folders
    return done


def _wanted_in(folder: Path, run: Run, rows: Sequence[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return the rows that a folder of records must have: those of all methods if the run can still go on there.

    Elsewhere lie records alone, which those of the first method make whole: to add the others, the network would have
    to be trained again.

    Args:
        folder: The folder of the records.
        run: The run that they may belong to.
        rows: Method and bit width of all rows: the float network's, then those of each method.
    """
    is_own = folder.parent.resolve() == run.folder.resolve()
    first = {"", *(method for method, _ in rows[1:2])}
    return {(method, bits) for method, bits in rows if is_own or method in first}


def _is_complete(records: Sequence[Record], wanted: set[tuple[str, int]], networks: int) -> bool:
    """Return whether all networks have the wanted records.

    Args:
        records: Records of one folder.
        wanted: Method and bit width of the records that each network needs; if empty, any record will do.
        networks: How many networks there are.
    """
    by_network: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    for row in map(identity, records):
        by_network[row.name].add((row.method, row.bits))
    return len(by_network) >= networks and all(rows >= wanted for rows in by_network.values())
