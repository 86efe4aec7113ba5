"""Post-training quantization of any `nn.Module` from Gram matrices of its layer inputs, without Lightning."""

from kdq_lightning.quantization.alphabet import QuantizedWeight
from kdq_lightning.quantization.packing import load_packed
from kdq_lightning.quantization.path import Quantized, quantize
from kdq_lightning.quantization.walk import LayerReport

__all__ = ["LayerReport", "Quantized", "QuantizedWeight", "load_packed", "quantize"]
