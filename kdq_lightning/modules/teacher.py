"""A frozen network that students are compared with."""

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.networks import features_at


class Teacher:
    """A frozen network: eval mode, no gradient, its own input statistics.

    It is no `nn.Module`, so that neither checkpoints nor DDP see its weights.
    """

    def __init__(self, network: nn.Module, statistics: Statistics, name: str, origin: Sequence[str] = ()) -> None:
        """Freeze the network.

        Args:
            network: Trained; it stays on its device.
            statistics: Those that it expects of its inputs.
            name: The name that it was built by.
            origin: Lines that tell a user which file it comes from and what that is.
        """
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.statistics, self.name, self.origin = statistics, name, tuple(origin)

    @cached_property
    def digest(self) -> str:
        """A hash of the weights, 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, h, w) in [0, 1]."""
        logits: Tensor = self.network(self._normalized(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor, layer: str) -> Tensor:
        """Return the features of a layer, (batch, channels, h', w'), of images in [0, 1]."""
        return features_at(self.network, layer, self._normalized(images))

    def _normalized(self, images: Tensor) -> Tensor:
        return normalize(images, self.statistics).contiguous(memory_format=torch.channels_last)
