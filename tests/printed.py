"""Reads what commands print."""

from collections.abc import Callable
from threading import Thread, current_thread, main_thread

from rich.console import ConsoleRenderable, RenderHook


class DrawnMeanwhile(RenderHook):
    """Lets another thread draw, as rich's own does, after the place of a line is known and before it is out."""

    def __init__(self, draw: Callable[[], None]) -> None:
        """Begin with no line printed; `draw` draws."""
        self.draw = draw
        self.finished: list[bool] = []

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Note whether the other thread could draw."""
        if current_thread() is main_thread():
            thread = Thread(target=self.draw, daemon=True)
            thread.start()
            thread.join(timeout=0.3)
            self.finished.append(not thread.is_alive())
        return renderables


def scores(printed: str, name: str = "top-1, %") -> list[float]:
    """Return a line of the table that `kdq test` prints: the network's score, or the mean and each peer's."""
    lines = [line.split(name)[1].split() for line in printed.splitlines() if line.lstrip().startswith(name)]
    return [float(cell) for cell in lines[0]] if lines else []
