"""Post-training quantization of any `nn.Module` from Gram matrices of its layer inputs, without Lightning."""

from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.layer_report import LayerReport
from kdq_lightning.quantization.packing import load_packed
from kdq_lightning.quantization.quantize import quantize
from kdq_lightning.quantization.quantized import Quantized, QuantizedNetworks

__all__ = ["LayerReport", "Quantized", "QuantizedNetworks", "QuantizedWeight", "load_packed", "quantize"]
