"""Everything that is written to TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from kdq_lightning.checkpoints import versions


class Dashboard(TensorBoardLogger):
    """Writes the events of one run folder, `<root>/<name>/version_N`, and claims that folder for itself."""

    def __init__(self, root: str | Path, name: str, version: int | None = None) -> None:
        """Name the run.

        Args:
            root: Folder of all runs.
            name: The run's name.
            version: An existing version to go on with; None claims the next free number.
        """
        super().__init__(root, name, version, default_hp_metric=False)

    @property
    def version(self) -> int | str:
        """The run's number; the folder is made with it, so two runs that start at once never share one."""
        if self._version is None:
            self._version = self._claim()
        return self._version

    def _claim(self) -> int:
        run = Path(self.root_dir)
        number = max((int(folder.name.removeprefix("version_")) + 1 for folder in versions(run)), default=0)
        while getattr(rank_zero_only, "rank", 0) == 0:
            try:
                (run / f"version_{number}").mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
        return number

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; Lightning's own `epoch` is none of our tags."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
