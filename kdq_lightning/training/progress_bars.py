"""Two bars of a quantization: layers solved, images evaluated."""

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class QuantizationBars:
    """Draws the bars while it is entered, on a terminal that someone watches; else it does nothing."""

    def __init__(self, shown: bool) -> None:
        """Prepare the bars.

        Args:
            shown: Whether this process draws at all.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)
        self._progress.disable = not (shown and self._progress.console.is_terminal)
        self._layers = self._progress.add_task("layers", total=None, visible=False)
        self._images = self._progress.add_task("images", total=None, visible=False)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away."""
        self._progress.stop()

    def start(self, name: str, images: int) -> None:
        """Begin with a network, on which so many images are evaluated over all bit widths."""
        self._progress.reset(self._layers, description=f"{name}: layers solved", total=None, visible=True)
        self._progress.reset(self._images, description=f"{name}: images evaluated", total=images, visible=True)

    def layers(self, done: int, total: int) -> None:
        """Show how many layers are solved."""
        self._progress.update(self._layers, completed=done, total=total)

    def images(self, count: int) -> None:
        """Count images as evaluated."""
        self._progress.advance(self._images, count)
