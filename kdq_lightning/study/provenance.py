"""Finds results that are outdated because the weights behind them were trained again."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kdq_lightning.errors import UserError
from kdq_lightning.files import file_digest
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.quantization.methods import DEFAULT_METHOD
from kdq_lightning.runs.checkpoints import find_packed, load_trained, read_checkpoint
from kdq_lightning.study.run import Run


def is_outdated(run: Run, version: Path) -> bool:
    """Return whether a version of a run used other weights than the study would give the run now.

    A checkpoint holds a digest of the teacher's weights, which is compared. If the checkpoint or the weights are gone,
    or belong to another study, nothing can be compared, and the version counts as up to date.

    Args:
        run: The run.
        version: Folder of the version.
    """
    with suppress(UserError):
        if run.command == "fit" and run.needs:
            then = read_checkpoint(version / "checkpoints" / "last.ckpt")
            classes = then["data"].get("class_names", ())
            return any(then.get(key, digest) != digest for key, digest in _digests_now(run, classes).items())
    return False


def _digests_now(run: Run, class_names: Sequence[str]) -> dict[str, str]:
    """Return the digests of the weights that a run would read now, by the keys that its checkpoint has for them.

    Args:
        run: The run.
        class_names: Its classes in the order of its labels, in which it puts those of its teacher; none if unknown.
    """
    prefix = "--model.init_args."
    options = dict(option.removeprefix(prefix).split("=", 1) for option in run.options if option.startswith(prefix))
    folders = {key: Path(options[key]) for key in ("teacher", "packed") if Path(options.get(key, "none")).is_dir()}
    digests: dict[str, str] = {}
    with suppress(UserError):
        if "teacher" in folders:
            trained = next(iter(load_trained(folders["teacher"]).values()))
            if sorted(trained.class_names) == sorted(class_names):
                trained = trained.for_classes(class_names, dataset="")
            digests["teacher"] = Teacher(trained.build(), trained.statistics, trained.network).digest
    with suppress(UserError):
        if "packed" in folders:
            bits = int(options["bits"]) if "bits" in options else None
            digests["packed"] = file_digest(find_packed(folders["packed"], bits, options.get("method", DEFAULT_METHOD)))
    return digests
