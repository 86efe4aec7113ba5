"""Decides the order of the training images.

The batches depend on (seed, epoch) only; each process takes a part.
"""

from collections.abc import Iterator

from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from kdq_lightning.data.images import Batch
from kdq_lightning.errors import UserError
from kdq_lightning.random_draws import random_uniform

_ORDER = -1  # last key of the hash; the views of an image take 0, 1, 2, ...


class GlobalBatchSampler(Sampler[Tensor]):
    """Yields this rank's image indices of each global batch.

    The global batches are the same for any number of ranks. Ranks take contiguous blocks of even size, so that images
    2k and 2k + 1 of a batch (which mixup pairs) stay together. No image is padded in or visited twice in an epoch.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare epoch 0.

        Args:
            indices: Canonical indices of the images to visit, int64, (images,).
            batch_size: Images of a global batch, over all ranks.
            seed: Seed of the order.
            shuffle: Draw a new order every epoch, from the seed and the epoch alone.
            drop_last: Leave out the last batch if it is incomplete, unless it is the only one. All ranks then get
                blocks of one size, as gradient averaging assumes.
            rank: This process.
            world_size: Number of processes.

        Raises:
            UserError: If a batch can't be shared evenly among the ranks that train on it.
        """
        batch_size = min(batch_size, len(indices)) if drop_last else batch_size
        if drop_last and world_size > 1 and batch_size % (2 * world_size):
            raise UserError(
                f"a training batch of {batch_size} images can't be shared evenly among {world_size} processes: "
                f"choose a batch_size that is a multiple of {2 * world_size}"
            )
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batches_done = 0
        self._start = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of an epoch; a position that was restored for another epoch is dropped."""
        if epoch != self.epoch:
            self.epoch, self._start, self.batches_done = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position within the epoch: {"epoch", "batches_done"}."""
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin at the position in `state`."""
        self.epoch = state["epoch"]
        self._start = self.batches_done = state["batches_done"]

    def __len__(self) -> int:
        """Return the number of global batches of a whole epoch, the same on every rank."""
        complete, rest = divmod(len(self.indices), self.batch_size)
        return complete if self.drop_last or not rest else complete + 1

    def __iter__(self) -> Iterator[Tensor]:
        """Yield int64 index tensors; the block of a small last batch may be empty on some ranks."""
        # A generator on purpose: Lightning makes the iterator of a resumed epoch before it sets the epoch.
        order = self._order()
        start, self._start = self._start, 0
        for batch in range(start, len(self)):
            self.batches_done = batch + 1
            yield self._share(order[batch * self.batch_size : (batch + 1) * self.batch_size])

    def _order(self) -> Tensor:
        if not self.shuffle:
            return self.indices
        return self.indices[random_uniform(self.seed, self.epoch, self.indices, _ORDER).argsort(stable=True)]

    def _share(self, batch: Tensor) -> Tensor:
        pairs = (len(batch) + 1) // 2
        first, last = (2 * (pairs * rank // self.world_size) for rank in (self.rank, self.rank + 1))
        return batch[first:last]


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader that Lightning asks for its position when it saves a checkpoint in the middle of an epoch."""

    def state_dict(self) -> dict[str, int]:
        """Return the sampler's position."""
        assert isinstance(self.sampler, GlobalBatchSampler)
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the sampler's position."""
        assert isinstance(self.sampler, GlobalBatchSampler)
        self.sampler.load_state_dict(state)
