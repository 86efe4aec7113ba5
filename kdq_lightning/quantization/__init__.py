"""Post-training quantization of any `nn.Module` from Gram matrices of its layer inputs; torch only."""

from kdq_lightning.quantization.alphabet import QuantizedWeight
from kdq_lightning.quantization.path import Quantized, quantize
from kdq_lightning.quantization.walk import LayerReport

__all__ = ["LayerReport", "Quantized", "QuantizedWeight", "quantize"]
