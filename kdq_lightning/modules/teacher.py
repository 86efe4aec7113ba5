"""A frozen network that students are compared with."""

import hashlib
from functools import cached_property

import torch
from torch import Tensor, nn

from kdq_lightning.data.normalization import Statistics, renormalize
from kdq_lightning.networks import stage2_features


class Teacher:
    """A frozen network: eval mode, no gradient, its own input statistics.

    It is no `nn.Module`, so that neither checkpoints nor DDP see its weights.
    """

    def __init__(self, network: nn.Module, mean: Statistics, std: Statistics) -> None:
        """Freeze the network."""
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.mean, self.std = mean, std

    @cached_property
    def digest(self) -> str:
        """Tells one teacher's weights from another's."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def logits(self, images: Tensor, mean: Statistics, std: Statistics) -> Tensor:
        """Return logits (batch, classes) of images (batch, 3, h, w) that are normalised by the given statistics."""
        logits: Tensor = self.network(renormalize(images, mean, std, self.mean, self.std))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor, mean: Statistics, std: Statistics) -> Tensor:
        """Return the features after the second stage, (batch, channels, h', w'); see `logits`."""
        return stage2_features(self.network, renormalize(images, mean, std, self.mean, self.std))
