"""Settings for one bit width. Arguments that are None get the best known value."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import Alphabet, grid
from kdq_lightning.quantization.solvers import RENAMED_SOLVERS, SOLVERS

SCALES = ("layer", "channel")


@dataclass(frozen=True)
class Recipe:
    """The steps that every layer of a network goes through.

    Attributes:
        bits: 1 to 8.
        solver: One of `SOLVERS`.
        codebook: One of `CODEBOOKS`.
        scale: "layer", the published formula, or "channel", searched by the layer's error.
        refine: Rounds of coordinate descent.
        match_moments: Give each output channel the float network's mean and deviation.
        patch_fraction: Least fraction of its patches that a layer is solved on.
        ridge: c of λ = c · mean(diag A) · min(1, N / rows), which draws the weights of a layer with few rows to the
            float ones; see `Gram.with_ridge`.
        stochastic: Round to floor or ceiling with probability by distance.
        official: Follow the published code in patches and dead columns, too.
    """

    bits: int
    solver: str = "least_squares"
    codebook: str = "int"
    scale: str = "channel"
    refine: int = 6
    match_moments: bool = True
    patch_fraction: float = 0.4
    ridge: float = 2.0
    stochastic: bool = False
    official: bool = False

    @property
    def may_fall_back(self) -> bool:
        """Whether plain rounding takes the place of a solution that is worse on rows that it hasn't seen."""
        return not self.official and not self.stochastic and self != self.plain

    @property
    def plain(self) -> "Recipe":
        """The same codebook and granularity with nothing but rounding."""
        return replace(self, solver="rounding", refine=0, match_moments=False)

    @property
    def alphabet(self) -> Alphabet:
        """The levels and their rounding."""
        return Alphabet(self.codebook, self.bits)


NetworkRecipe = Recipe | Mapping[str, Recipe]
"""The steps of a network's layers: the same for all, or of each layer by name."""


def recipe_of(recipe: NetworkRecipe, layer: str) -> Recipe:
    """Return the steps of one layer."""
    return recipe if isinstance(recipe, Recipe) else recipe[layer]


def make_recipe(bits: int, mode: str | None, **given: str | float | None) -> Recipe:
    """Fill in what was not given and check the rest.

    Raises:
        UserError: If an argument is unknown, out of range, or set beside mode "official".
    """
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if mode not in (None, "official"):
        raise UserError(f"unknown mode {mode!r}: leave it out, or choose 'official'")
    if mode and (fixed := changes.keys() - {"patch_fraction", "stochastic"}):
        raise UserError(f"mode 'official' fixes {', '.join(sorted(fixed))}: leave out either these or the mode")
    recipe = replace(official_recipe(bits) if mode else best_recipe(bits), **changes)
    if new := RENAMED_SOLVERS.get(recipe.solver):
        raise UserError(f"the solver {recipe.solver} is now called {new}: give that name")
    for name, choices in (("solver", SOLVERS), ("scale", SCALES)):
        if getattr(recipe, name) not in choices:
            raise UserError(f"unknown {name} {getattr(recipe, name)!r}: choose one of {', '.join(choices)}")
    if recipe.refine < 0:
        raise UserError(f"refine counts rounds of coordinate descent, got {recipe.refine}")
    if not 0 < recipe.patch_fraction <= 1:
        raise UserError(f"patch_fraction must be above 0 and at most 1, got {recipe.patch_fraction}")
    grid(recipe.codebook, bits)
    return recipe


def best_recipe(bits: int) -> Recipe:
    """Return the best known, chosen on held-out training images of three networks."""
    return Recipe(bits, codebook="midrise" if bits <= 2 else "int")


def official_recipe(bits: int) -> Recipe:
    """Return the published recursion (Zhang, Zhou, Saab 2023, arXiv 2201.11113), its alphabet, scale and patches."""
    return Recipe(
        bits,
        "gpfq",
        "paper",
        "layer",
        refine=0,
        match_moments=False,
        patch_fraction=0.25,
        ridge=0.0,
        official=True,
    )
