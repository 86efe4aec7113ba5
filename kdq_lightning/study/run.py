"""A run of a study: its command, the folder of its versions, and how far it has come."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from kdq_lightning.commands.running import Settings, read_settings
from kdq_lightning.errors import UserError
from kdq_lightning.runs.versions import newest_finished, newest_version


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        name: Its name in the study's file.
        seed: Its seed.
        command: `fit`, or `quantize` for a network that someone else has trained.
        options: The command's options, with their dashes.
        root: Folder of the seed's run folders.
        needs: Names of the runs of the same seed whose weights this run reads.
    """

    name: str
    seed: int
    command: str
    options: tuple[str, ...]
    root: Path
    needs: tuple[str, ...]

    @property
    def label(self) -> str:
        """Name and seed, for people."""
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the run's versions."""
        return self.root / (f"{self.name}-quantized" if self.command == "quantize" else self.name)

    @property
    def log(self) -> Path:
        """File that gets what the run prints."""
        return self.root / f"{self.name}.log"

    @property
    def arguments(self) -> list[str]:
        """The command and its options, for `kdq_lightning.cli.main`."""
        return [self.command, *self.options]

    @property
    def settings_arguments(self) -> list[str]:
        """Arguments of a training with the same settings, which can be read before any weights exist."""
        return ["fit", *self.options]

    def read_settings(self, arguments: list[str]) -> Settings:
        """Return what its command would run with.

        Args:
            arguments: `arguments` or `settings_arguments`.

        Raises:
            UserError: If an option is unknown or malformed; it names the run, as a study's file has options of many.
        """
        try:
            return read_settings(arguments)
        except UserError as error:
            raise UserError(f"run {self.name}: {error}") from error

    @property
    def line(self) -> str:
        """The command as one types it in a shell."""
        return shlex.join(["kdq", *self.arguments])

    @property
    def serves_all_seeds(self) -> bool:
        """Whether the run quantizes public weights, which are the same for every seed."""
        return self.command == "quantize" and not self.needs

    @property
    def is_trained(self) -> bool:
        """Whether the weights that other runs read from this run exist."""
        return self.command == "quantize" or self.finished is not None

    @property
    def finished(self) -> Path | None:
        """The newest finished version, whose weights other runs read; None if there is none."""
        return newest_finished(self.folder)

    @property
    def unfinished(self) -> Path | None:
        """The newest version, if training can go on from its checkpoint; else None."""
        newest = newest_version(self.folder)
        if self.command != "fit" or newest is None or not (newest / "checkpoints" / "last.ckpt").is_file():
            return None
        return newest
