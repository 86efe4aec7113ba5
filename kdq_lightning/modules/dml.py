"""Deep mutual learning: K peers without a teacher, each pulled towards the others' predictions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import UserError
from kdq_lightning.losses import mutual_loss
from kdq_lightning.modules.classifier import Classifier, Losses
from kdq_lightning.modules.scores import Scores
from kdq_lightning.networks import build_network
from kdq_lightning.runs.trained_network import TrainedNetwork


class MutualLearning(Classifier):
    """Trains K peers at once on CE_i + 1/(K-1)·Σ_{j≠i} KL(p_j ‖ p_i) (Zhang et al. 2017, eq. 9), and minimises the sum.

    The peers step together, where the paper's loop is sequential. One optimizer over all peers, whose predictions are
    constants to each other, is the same update as an optimizer each.
    """

    def __init__(self, networks: list[str], num_classes: int, strategy: str = "dml", **kwargs: Any) -> None:
        """Build the peers.

        Args:
            networks: Two or more names as `network` of `Classifier` takes, one a peer; they may differ, but share
                `network_args`.
            num_classes: Number of classes; the command line takes it from the data.
            strategy: What records call this run.
            **kwargs: Those of `Classifier`.

        Raises:
            UserError: If there are fewer than two peers.
        """
        if len(networks) < 2:
            raise UserError(f"mutual learning needs at least 2 networks, got {len(networks)}: {networks}")
        self.peer_networks = networks
        super().__init__(network=networks[0], num_classes=num_classes, strategy=strategy, **kwargs)

    def _build_networks(self) -> None:
        self.peers = nn.ModuleList(
            build_network(name, self.num_classes, self.network_args) for name in self.peer_networks
        )

    def networks(self) -> dict[str, nn.Module]:
        """Return the peers as peer0, peer1, ..."""
        return {f"peer{i}": peer for i, peer in enumerate(self.peers)}

    def network_names(self) -> dict[str, str]:
        """Return each peer's architecture."""
        return {f"peer{i}": name for i, name in enumerate(self.peer_networks)}

    def _load_networks(self, trained: Mapping[str, TrainedNetwork]) -> None:
        """Load all peers, or from a file of one network, such as a packed peer, that peer alone, except to train."""
        alone = next(iter(trained.values()))
        if len(trained) == 1 and not self.fitting and alone.network in self.peer_networks:
            self.peers = nn.ModuleList([self.peers[self.peer_networks.index(alone.network)]])
            self.peer_networks = [alone.network]
            self.scores = Scores(["peer0"])
            trained = {"peer0": alone}
        super()._load_networks(trained)

    def losses(self, view: View) -> Losses:
        """Return the sum of the peers' losses; each of them is logged."""
        images = self.normalized(view.resized)
        logits = [peer(images) for peer in self.peers]
        losses = mutual_loss(logits, view.labels)
        parts = {f"loss/peer{i}": loss for i, loss in enumerate(losses)}
        return Losses(torch.stack(losses).sum(), parts, torch.stack(logits))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip a peer at a time: one norm over all of them would couple them."""
        if not gradient_clip_val:
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for peer in self.peers:
            clip(peer.parameters(), gradient_clip_val)
