"""Brevitas (AMD, github.com/Xilinx/brevitas) on the same network and images: `pip install "kdq-lightning[peers]"`."""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError

PEERS = ("brevitas_gpfq", "brevitas_gptq", "brevitas_qronos")


@torch.no_grad()
def quantize_brevitas(model: nn.Module, batches: Sequence[Tensor], bits: int, peer: str) -> nn.Module:
    """Return a copy of a network, quantized by Brevitas: 2^bits - 1 levels, the scale with the least weight error.

    Args:
        model: Of 2-D convolutions and linear layers, in eval mode.
        batches: Normalised calibration images.
        bits: Bit width, 2 to 8.
        peer: One of `PEERS`.

    Raises:
        UserError: If Brevitas is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from brevitas.graph.gpfq import gpfq_mode
            from brevitas.graph.gptq import gptq_mode
            from brevitas.graph.qronos import Qronos
    except ImportError as error:
        raise UserError(f"{peer} needs Brevitas: install it by pip install 'kdq-lightning[peers]'") from error
    quantized = with_brevitas_layers(model, bits)
    quantized(batches[0][:1])  # Brevitas finds its scales in a first forward
    if peer == "brevitas_gptq":
        mode = gptq_mode(quantized)
    elif peer == "brevitas_qronos":
        mode = gpfq_mode(quantized, algorithm_impl=Qronos)
    else:
        mode = gpfq_mode(quantized)
    with mode as algorithm:
        for _ in range(algorithm.num_layers):
            for batch in batches:
                algorithm.model(batch)
            algorithm.update()
    return quantized


def with_brevitas_layers(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy of a network, its convolutions and linear layers replaced by Brevitas' own."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE

    quantized = copy.deepcopy(model)
    for name, layer in list(quantized.named_modules()):
        weight = {"weight_quant": Int8WeightPerChannelFloatMSE, "weight_bit_width": bits}
        if isinstance(layer, nn.Conv2d):
            names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
            shape = {name: getattr(layer, name) for name in names}
            replacement = QuantConv2d(**shape, bias=layer.bias is not None, **weight)
        elif isinstance(layer, nn.Linear):
            replacement = QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **weight)
        else:
            continue
        replacement.load_state_dict(layer.state_dict(), strict=False)
        parent, _, leaf = name.rpartition(".")
        setattr(quantized.get_submodule(parent), leaf, replacement)
    return quantized.eval()
