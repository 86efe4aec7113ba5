"""The key of a result (network, method, bit width), and the file names made from it."""

from typing import NamedTuple

from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD


class Identity(NamedTuple):
    """One network of a run, quantized by one method at one size.

    Attributes:
        name: `peer0`, ... of mutual learning, otherwise the network's name; file names and keys have `-` for its slash.
        method: Method that quantized it; "" for the float network.
        bits: Bit width; of a file of mixed bits its budget in bytes.
    """

    name: str
    method: str
    bits: int

    def correct_key(self, split: str) -> str:
        """Return the key of the vector of correctly classified images in `correct.safetensors`.

        Args:
            split: "val" or "test".
        """
        method = "" if self.method in ("", DEFAULT_METHOD) else f"{self.method}/"
        return f"{self._safe_name}/{split}/{method}{self.bits}"

    def packed_name(self, codebook: str) -> str:
        """Return the name of the packed file.

        Args:
            codebook: Of the layers; several are joined by "+". The name of a file of mixed bits does without.
        """
        if self.method == MIXED_METHOD:
            return f"{self._safe_name}-{self.method}-{self.bits}B.safetensors"
        method = "" if self.method == DEFAULT_METHOD else f"{self.method}-"
        return f"{self._safe_name}-{method}{codebook}-{self.bits}bit.safetensors"

    @property
    def _safe_name(self) -> str:
        """The name without slashes, which would make folders."""
        return self.name.replace("/", "-")
