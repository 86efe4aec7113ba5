"""Walks over one network, of as many recipes together as the memory allows."""

from collections.abc import Callable, Sequence
from itertools import chain

from torch import nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.forwards import PART_IMAGES
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.layerwise import Calibration, Walk
from kdq_lightning.quantization.probe import Plan
from kdq_lightning.quantization.quantized import Quantized
from kdq_lightning.quantization.recipes import NetworkRecipe, Recipe, recipe_of
from kdq_lightning.quantization.solution import working_bytes

HOLES = 1.7  # of the bytes that live: what the heap takes for activations, between those of other forwards that live on


class Walks:
    """Quantizes a network by any recipes.

    Attributes:
        network: In eval mode.
        plan: Of a walk over it.
        calibration: Its images.
    """

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        calibration: Calibration,
        max_memory_gb: float,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Prepare to walk.

        Args:
            network: In eval mode.
            plan: Of a walk over it.
            calibration: Its images.
            max_memory_gb: As many recipes walk together as fit into this many GB.
            progress: Called after each layer with layers done, layers in all, and its name.
        """
        self.network, self.plan, self.calibration = network, plan, calibration
        self._limit = max_memory_gb * 1e9
        self._progress = progress
        self._done = self._total = 0

    def expect(self, recipes: Sequence[Recipe], candidates: Sequence[Recipe], budgets: int) -> None:
        """Count the layers to come: those of the walks by these recipes, and those of mixed bits.

        Args:
            recipes: One a bit width.
            candidates: Recipes that the layers of mixed bits are chosen from.
            budgets: Number of networks of mixed bits.
        """
        passes = len(self._groups(recipes))
        if budgets:
            passes += 1 + len(self._groups([candidates[-1]] * budgets))
        self._total = passes * len(self.plan.samples)

    def on_layer(self, name: str) -> None:
        """Report the progress after a layer."""
        self._done = min(self._done + 1, self._total)
        self._progress(self._done, self._total, name)

    def run(self, recipes: Sequence[NetworkRecipe]) -> list[Quantized]:
        """Return the network quantized by each recipe."""
        results = []
        for group in self._groups(recipes):
            walk = Walk(self.network, self.plan, self.calibration, group, self.on_layer)
            walk.run()
            results += [Quantized(*parts) for parts in zip(walk.models, walk.reports, walk.weights, strict=True)]
        return results

    def _groups(self, recipes: Sequence[NetworkRecipe]) -> list[list[NetworkRecipe]]:
        if not recipes:
            return []
        return split_by_memory(self.network, self.plan, recipes, self.calibration.share, self._limit)


def split_by_memory(
    network: nn.Module, plan: Plan, recipes: Sequence[NetworkRecipe], images: int, limit: float
) -> list[list[NetworkRecipe]]:
    """Split bit widths into groups that walk together within `limit` bytes, as few as can be.

    Raises:
        UserError: If a single bit width takes more.
    """
    for size in range(len(recipes), 0, -1):
        groups = [list(recipes[start : start + size]) for start in range(0, len(recipes), size)]
        need = max(walk_bytes(network, plan, group, images) for group in groups)
        if need <= limit:
            return groups
    gigabytes = f"{need / 1e9:.3g} GB"
    raise UserError(f"one bit width takes {gigabytes} on {images} images: raise max_memory_gb, or give fewer images")


def walk_bytes(network: nn.Module, plan: Plan, recipes: Sequence[NetworkRecipe], images: int) -> float:
    """Return the bytes that a walk over all these recipes at once takes at its peak, with its copies of the network."""
    layers, memory = layers_of(network), plan.activations
    stacked = images * (1 + len(recipes))
    solving = (
        HOLES * memory.at_layer[name] * stacked
        + working_bytes(layers[name], [recipe_of(recipe, name) for recipe in recipes])
        for name in plan.samples
        if name not in plan.tied
    )
    forward = images * memory.image + PART_IMAGES * memory.peak
    copies = len(recipes) * sum(tensor.nbytes for tensor in chain(network.parameters(), network.buffers()))
    return HOLES * forward + max(solving, default=0.0) + copies
