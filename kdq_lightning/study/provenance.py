"""Whether a run learned from the weights that lie here now, or from such as were trained again since."""

from contextlib import suppress
from pathlib import Path

from kdq_lightning.checkpoints import FINISHED, load_trained, read_checkpoint, versions
from kdq_lightning.config_hash import version_hash
from kdq_lightning.errors import UserError
from kdq_lightning.modules.recover import find_packed, packed_digest
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.study.plan import Run


def is_outdated(run: Run, version: Path) -> bool:
    """Tell whether a version of a run learned from other weights than its study would give it now.

    A checkpoint names the weights that taught it. Where it or they are gone, nothing can be compared: not outdated.
    """
    if not run.needs:
        return False
    try:
        checkpoint = read_checkpoint(version / "checkpoints" / "last.ckpt")
    except UserError:
        return False
    return any(checkpoint.get(key, digest) != digest for key, digest in _digests_now(run).items())


def will_be_trained_again(run: Run, config_hash: str) -> bool:
    """Tell whether the newest finished version of a run without records is one of other settings."""
    finished = [version for version in versions(run.folder) if (version / FINISHED).exists()]
    return run.command == "fit" and bool(finished) and version_hash(finished[-1]) != config_hash


def _digests_now(run: Run) -> dict[str, str]:
    """Return what tells the weights in the run folders that a run reads, by the key in its checkpoint."""
    prefix = "--model.init_args."
    options = dict(option.removeprefix(prefix).split("=", 1) for option in run.options if option.startswith(prefix))
    folders = {key: Path(options[key]) for key in ("teacher", "packed") if Path(options.get(key, "none")).is_dir()}
    digests: dict[str, str] = {}
    with suppress(UserError):
        if "teacher" in folders:
            trained = next(iter(load_trained(folders["teacher"]).values()))
            digests["teacher"] = Teacher(trained.build(), trained.mean, trained.std).digest
    with suppress(UserError):
        if "packed" in folders:
            bits = int(options["bits"]) if "bits" in options else None
            digests["packed"] = packed_digest(find_packed(folders["packed"], bits))
    return digests
