"""Post-training quantization of any `nn.Module` from Gram matrices of its layer inputs, without Lightning.

The files in the order in which the data pass through them:

    methods.py          the methods by name -> arguments of `quantize`
    quantize.py         `quantize`: model, images and arguments -> a copy of the model (copies.py) and a `Recipe` for
                        each bit width (recipes.py)
    probe.py            two images -> `Plan`: which layers can be quantized, and in how much memory
                        (observation.py watches one forward, memory.py measures, comparison.py compares outputs)
    walks.py            the recipes -> groups of them that walk together within the memory
    layerwise.py        a walk: float network and copies run forward and stop at each layer
                        (forwards.py pauses them, torch_state.py keeps torch's settings of each)
    gram.py             the inputs of a layer -> its Gram matrices (draws.py chooses the patches)
    layer_choice.py     Gram matrices -> the layer's solution, or plain rounding where that is better
                        (solution.py solves, with solvers.py and codebooks.py; layer_report.py tells how it went)
    quantized.py        what `quantize` returns
    packing.py          a quantized network -> packed file, and back (bitstream.py packs the codes)

mixed.py gives each layer its own bit width within a budget of bytes: sensitivity.py measures how much each layer
matters, allocation.py chooses, and a walk at these bit widths follows.
"""

from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.layer_report import LayerReport
from kdq_lightning.quantization.packing import load_packed
from kdq_lightning.quantization.quantize import quantize
from kdq_lightning.quantization.quantized import Quantized, QuantizedNetworks

__all__ = ["LayerReport", "Quantized", "QuantizedNetworks", "QuantizedWeight", "load_packed", "quantize"]
