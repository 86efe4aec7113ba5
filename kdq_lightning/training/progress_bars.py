"""Two bars of a quantization: layers solved, images evaluated."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class QuantizationBars:
    """Draws two bars while it is entered, on a terminal; where there is none it draws nothing."""

    def __init__(self, shown: bool, after_update: Callable[[], None] = lambda: None) -> None:
        """Prepare the bars.

        Args:
            shown: Whether this process draws at all.
            after_update: Called after each layer and each batch of images, drawn or not; may raise to end the work.
        """
        self._after_update = after_update
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
        """Begin with a network.

        Args:
            name: Of the network.
            images: Number of images that are to be evaluated, over all methods and bit widths.
        """
        self._progress.reset(self._layers, description=f"{name}: layers solved", total=None, visible=True)
        self._progress.reset(self._images, description=f"{name}: images evaluated", total=images, visible=True)

    def layers(self, done: int, total: int, name: str) -> None:
        """Show how many layers are solved; the `progress` of `quantize`.

        Args:
            done: Layers that are solved.
            total: Layers in all.
            name: Of the layer that was solved last.
        """
        self._progress.update(self._layers, completed=done, total=total)
        self._after_update()

    def images(self, count: int) -> None:
        """Count images as evaluated; the `progress` of `evaluate`."""
        self._progress.advance(self._images, count)
        self._after_update()
