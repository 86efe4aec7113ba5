"""What `quantize` returns: quantized networks by bit width, and by budget where bits differ from layer to layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.layer_report import LayerReport
from kdq_lightning.quantization.packing import file_bytes, save_packed


@dataclass(frozen=True)
class Quantized:
    """A network at one bit width, or with a bit width of its own for each layer.

    Attributes:
        model: The quantized copy, in eval mode; a layer that moment matching gave a bias has it as a parameter, and
            weights that the model given computes (weight norm, pruning) are plain parameters.
        layers: What became of each layer, in execution order, then why other parameters of two or more dimensions stay
            in float.
        weights: The quantized weights by module name.
        budget: Most bytes that its packed file may have; None for no limit.
    """

    model: nn.Module
    layers: list[LayerReport]
    weights: dict[str, QuantizedWeight]
    budget: int | None = None

    @property
    def share(self) -> float:
        """The quantized part of the numbers in parameters of two or more dimensions, 0 to 1."""
        matrices = {id(parameter): parameter.numel() for parameter in self.model.parameters() if parameter.dim() > 1}
        quantized = {id(self.model.get_submodule(name).weight): weight for name, weight in self.weights.items()}
        return sum(weight.codes.numel() for weight in quantized.values()) / max(1, sum(matrices.values()))

    def file_bytes(self, metadata: Mapping[str, str] | None = None) -> int:
        """Return the size of the packed file that `save` writes, in bytes."""
        return file_bytes(self.model, self.weights, self._with_share(metadata))

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the packed file: all that inference needs, and `metadata` for whoever reads it.

        `quantized_share` is added to the metadata if a part of the weights stays in float.

        Raises:
            UserError: If the file can't be written, the model's weights have changed since, or the file would be larger
                than the budget.
        """
        if self.budget is not None and (size := self.file_bytes(metadata)) > self.budget:
            raise UserError(
                f"with its metadata the file takes {size:,} bytes, more than its budget of {self.budget:,}: quantize"
                " with metadata_bytes set to what the metadata take"
            )
        save_packed(path, self.model, self.weights, self._with_share(metadata))

    def _with_share(self, metadata: Mapping[str, str] | None) -> dict[str, str]:
        return {**(metadata or {}), **({"quantized_share": f"{self.share:.4g}"} if self.share < 1 else {})}


class QuantizedNetworks(dict[int, Quantized]):
    """The quantized networks by bit width.

    Attributes:
        mixed: Those with a bit width of its own for each layer, by their budget in bytes.
    """

    def __init__(self) -> None:
        """Start without a network."""
        super().__init__()
        self.mixed: dict[int, Quantized] = {}
