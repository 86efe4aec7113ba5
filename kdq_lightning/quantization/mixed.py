"""A bit width for each layer, so that the packed file fits into a budget of bytes and the network suffers least."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.allocation import allocate
from kdq_lightning.quantization.bitstream import packed_size
from kdq_lightning.quantization.codebooks import CODEBOOKS, QuantizedWeight
from kdq_lightning.quantization.copies import copy_for_walk
from kdq_lightning.quantization.gram import layers_of
from kdq_lightning.quantization.probe import tied_layers
from kdq_lightning.quantization.quantized import Quantized
from kdq_lightning.quantization.recipes import Recipe, make_recipe
from kdq_lightning.quantization.sensitivity import own_errors
from kdq_lightning.quantization.walks import Walks

WIDTHS = range(1, 9)
BETWEEN = (("narrow", 2), ("paper", 2), ("paper", 3))
"""Three, five and nine levels, whose codes take 1.6, 2.3 and 3.2 bits."""


def candidate_recipes(mode: str | None, **given: str | float | None) -> list[Recipe]:
    """Return the recipes that a layer may get, from the fewest levels to the most.

    Args:
        mode: See `make_recipe`.
        **given: Likewise. Without a codebook, some recipes lie between whole bit widths.
    """
    codebook = "paper" if mode else given.get("codebook")
    widths = [
        bits for bits in WIDTHS if codebook not in CODEBOOKS or len(CODEBOOKS[codebook].levels(2 ** (bits - 1))) > 1
    ]
    recipes = [make_recipe(bits, mode, **given) for bits in widths]
    if codebook is None:
        recipes += [replace(make_recipe(bits, mode, **given), codebook=name) for name, bits in BETWEEN]
    return sorted(recipes, key=lambda recipe: len(recipe.alphabet.grid))


def check_budgets(budgets: Sequence[int]) -> None:
    """Refuse budgets that are no sizes.

    Raises:
        UserError: If one isn't a whole number of bytes, or stands there twice.
    """
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise UserError(f"a budget is a number of bytes such as 100_000, got {budget!r}")
    if len(set(budgets)) != len(budgets):
        raise UserError(f"each budget stands once, got {list(budgets)}")


def check_least(network: nn.Module, budgets: Sequence[int], **given: str | float | None) -> None:
    """Refuse budgets that no choice of bits fits, before the network is trained.

    Args:
        network: To quantize later; its weights may have any values.
        budgets: Bytes of the packed files.
        **given: See `candidate_recipes`.

    Raises:
        UserError: If one is too small even where every layer has the fewest levels. Layers that can't be quantized
            only make the file larger.
    """
    if not budgets:
        return
    copied = copy_for_walk(network)
    names = list(layers_of(copied))
    tied = tied_layers(copied, names)
    files = Files(copied, [name for name in names if name not in tied], tied, candidate_recipes(None, **given))
    files.check(min(budgets), files.size([0] * len(files.names)))


def quantize_mixed(
    walks: Walks, recipes: Sequence[Recipe], budgets: Sequence[int], metadata_bytes: int
) -> dict[int, Quantized]:
    """Choose the bits of each layer for each budget, and walk once more at these bits.

    Codes of a walk at one bit width make up for the errors of that width, so those of different walks don't go
    together. Exchanging bits between two layers afterwards, kept where it would bring the logits of held-out images
    nearer to the float network's, was tried and is left out: of 100 exchanges on a resnet20 none was kept that held.

    Args:
        walks: Over the network.
        recipes: To choose from, from the fewest levels to the most.
        budgets: Bytes of the packed files.
        metadata_bytes: What each budget leaves for metadata.

    Returns:
        The networks by budget.

    Raises:
        UserError: If a budget is too small.
    """
    errors = own_errors(walks.network, walks.plan, walks.calibration, recipes, walks.on_layer)
    files = Files(walks.network, list(errors), walks.plan.tied, recipes)
    reserved = dict.fromkeys(budgets, metadata_bytes)
    results: dict[int, Quantized] = {}
    while missing := [budget for budget in budgets if budget not in results]:
        choices = [files.choose(list(errors.values()), budget, reserved[budget]) for budget in missing]
        chosen = [dict(zip(errors, [recipes[i] for i in choice], strict=True)) for choice in choices]
        for budget, result in zip(missing, walks.run(chosen), strict=True):
            size = result.file_bytes() + metadata_bytes
            if size <= budget:
                results[budget] = replace(result, budget=budget)
            reserved[budget] += size - budget  # the layout is compressed, and may take some bytes more than expected
    return {budget: results[budget] for budget in budgets}


class Files:
    """The packed files of a network by the recipes of its layers, before anything is solved.

    Attributes:
        names: Of the layers that get a recipe.
        recipes: To choose from.
        code_bytes: What the codes of each layer take by each recipe.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], tied: Mapping[str, str], recipes: Sequence[Recipe]
    ) -> None:
        """Describe a network.

        Args:
            network: In float.
            names: Of the layers that get a recipe, in execution order.
            tied: Layers that share the weight of another, with the name of that one.
            recipes: To choose from, from the fewest levels to the most.
        """
        self.names, self.recipes = names, recipes
        self._tied = {name: first for name, first in tied.items() if first in names}
        self._model = copy.deepcopy(network)
        self._shapes = {name: layer.weight.shape for name, layer in layers_of(network).items()}
        for name in names:
            layer = self._model.get_submodule(name)
            if recipes[0].match_moments and layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
        self.code_bytes = [
            [packed_size(self._shapes[name].numel(), len(recipe.alphabet.grid)) for recipe in recipes] for name in names
        ]

    def size(self, choice: Sequence[int]) -> int:
        """Return the size of a file in bytes, without metadata; a layer that is rounded plainly may take less.

        Args:
            choice: Index of each layer's recipe.
        """
        weights = {name: self._weight(name, self.recipes[i]) for name, i in zip(self.names, choice, strict=True)}
        weights |= {name: weights[first] for name, first in self._tied.items()}
        return Quantized(self._model, [], weights).file_bytes()

    def _weight(self, name: str, recipe: Recipe) -> QuantizedWeight:
        shape = self._shapes[name]
        scales = shape[0] if recipe.scale == "channel" or recipe.match_moments else 1
        codes = torch.zeros((), dtype=torch.int16).expand(shape)
        return QuantizedWeight(codes, recipe.alphabet.grid, torch.zeros(scales), recipe.codebook, recipe.bits)

    @staticmethod
    def check(budget: int, least: int) -> None:
        """Refuse a budget below the size of the smallest file, both in bytes."""
        if least > budget:
            raise UserError(
                f"a budget of {budget:,} bytes is too small for this network: with the fewest levels for every layer"
                f" its file takes {least:,} bytes"
            )

    def choose(self, errors: Sequence[Sequence[float]], budget: int, reserved: int) -> list[int]:
        """Return the index of each layer's recipe, so that the file fits and the layers' errors are least.

        Args:
            errors: Of each layer by each recipe.
            budget: Bytes of the file.
            reserved: Of these, what is left for metadata, or for a file that turned out larger.

        Raises:
            UserError: If no choice fits.
        """
        fitting = budget - reserved
        smallest, largest = [0] * len(self.names), [len(self.recipes) - 1] * len(self.names)
        least, most = self.size(smallest), self.size(largest)
        self.check(budget, least + reserved)
        if most <= fitting:
            if most < fitting:
                warnings.warn(
                    f"a budget of {budget:,} bytes is more than the {most + reserved:,} that 8 bits for every layer"
                    " take: these are given",
                    stacklevel=2,
                )
            return largest
        fewest = sum(map(min, self.code_bytes))
        room = fitting - least + fewest  # for codes; the layout beside them is compressed, so its size varies
        while room > fewest:
            choice = allocate(errors, self.code_bytes, room)
            if (size := self.size(choice)) <= fitting:
                return choice
            room -= size - fitting
        return smallest
