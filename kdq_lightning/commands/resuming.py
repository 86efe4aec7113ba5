"""Going on with a run that was cut off: which checkpoint it is, and whether it is this command's run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from kdq_lightning.errors import UserError
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.runs.checkpoints import read_checkpoint
from kdq_lightning.runs.records import read_records
from kdq_lightning.runs.versions import is_finished, is_version, newest_unfinished, newest_version, version_number
from kdq_lightning.training.dashboard import Dashboard
from kdq_lightning.training.lightning_internals import completed_epochs


@dataclass(frozen=True)
class ResumedRun:
    """A run that `kdq fit --ckpt_path` goes on with.

    Attributes:
        path: Its checkpoint, `.../<name>/version_N/checkpoints/<file>`.
        checkpoint: What that file holds.
    """

    path: Path
    checkpoint: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The version's folder, in which training goes on."""
        return self.path.parent.parent

    def dashboard(self) -> Dashboard:
        """Return the logger of the version; what it logged after the checkpoint is dropped, as it comes again."""
        after_step = None if is_finished(self.folder) else self.checkpoint["global_step"]
        return Dashboard(self.folder.parent.parent, self.folder.parent.name, version_number(self.folder), after_step)

    def has_ended(self, trainer: Trainer) -> bool:
        """Return whether the checkpoint is that of the last step, so that there is nothing left to train."""
        limits = (
            (completed_epochs(self.checkpoint), trainer.max_epochs),
            (self.checkpoint["global_step"], trainer.max_steps),
        )
        return any(limit is not None and 0 < limit <= done for done, limit in limits)

    def check_is_run_of(self, module: Classifier) -> None:
        """Compare what the run was started with to what this command asks for.

        Args:
            module: Attached to a trainer that knows its datamodule.

        Raises:
            UserError: If they differ in something that changes the result, such as seed, epochs or network.
        """
        now = {
            **module.resume_requirements(),
            "num_classes": module.num_classes,
            "networks": module.network_names(),
        }
        then = {
            "optimizer": "sgd",  # of checkpoints that don't name it
            **self.checkpoint["plan"],
            "num_classes": self.checkpoint["data"]["num_classes"],
            "networks": {name: entry["network"] for name, entry in self.checkpoint["networks"].items()},
        }
        for name, value in now.items():
            if then.get(name) != value:
                advice = "give the same, or leave out --ckpt_path"
                if name in ("max_epochs", "max_steps"):
                    advice = (
                        f"its learning rate falls to 0 there, so give the same, --trainer.{name} {then.get(name)}; or"
                        f" train on as a new run, with --model.init_args.weights {self.path} in place of --ckpt_path"
                    )
                raise UserError(
                    f"{self.path} was trained with {name} {then.get(name)}, this command says {value}: {advice}"
                )


def find_resumed_run(path: str, run: Path) -> ResumedRun:
    """Return the run that `--ckpt_path` names.

    Args:
        path: "last" for the newest version of `run`, the folder of a run (its newest version is taken) or of a version
            (its last checkpoint), or a checkpoint in a version's folder.
        run: Folder of the run that the command would start.

    Raises:
        UserError: If there is no such checkpoint, it is damaged, or it lies in no run folder.
    """
    place = run if path == "last" else Path(path)
    if place.is_dir() and not (place / "checkpoints").is_dir():
        place = newest_version(place) or place
    checkpoint = (place / "checkpoints" / "last.ckpt" if place.is_dir() else place).resolve()
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} does not exist: there is nothing to go on from, leave out --ckpt_path")
    if checkpoint.parent.name != "checkpoints" or not is_version(checkpoint.parent.parent):
        raise UserError(
            f"{checkpoint} lies in no run folder (version_N/checkpoints), so training can't go on there;"
            " to start from its weights, give --model.init_args.weights"
        )
    return ResumedRun(checkpoint, read_checkpoint(checkpoint))


def unfinished_quantization(run: Path, weights: Path, config_hash: str) -> int | None:
    """Return the number of the version that a broken `kdq quantize` of the same settings and weights has left.

    Args:
        run: Folder of the quantizations, `<name>-quantized`.
        weights: File that is to be quantized.
        config_hash: Of the records that are to be written.

    Returns:
        The number of the newest version; None if that is finished, of other settings, or older than the weights.
    """
    newest = newest_unfinished(run)
    if newest is None or weights.stat().st_mtime > newest.stat().st_mtime:
        return None
    if any(record.config_hash != config_hash for record in read_records(newest)):
        return None
    return version_number(newest)
