"""The images behind the loaders of any project, read one by one and in order."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from kdq_lightning.errors import UserError
from kdq_lightning.random_draws import random_integers

OWN_EVALUATION = (
    "give PostTrainingQuantization(evaluate=...) a function of network and loader that returns numbers by name"
)
BATCH = 64  # images, where the loader's own sampler hides how many it takes


def one_loader(loaders: Any, what: str) -> DataLoader[Any] | None:  # noqa: ANN401 - whatever Lightning takes
    """Return the loader among a trainer's loaders; of several validation or test loaders the first.

    Args:
        loaders: As the trainer has them.
        what: Of which images, for the error.

    Raises:
        UserError: If its images can't be read by their index.
    """
    if isinstance(loaders, list | tuple) and (len(loaders) == 1 or what != "training"):
        loaders = loaders[0] if loaders else None
    if loaders is None:
        return None
    if not isinstance(loaders, DataLoader) or not hasattr(loaders.dataset, "__len__") or batch_size_of(loaders) < 1:
        raise UserError(
            f"PostTrainingQuantization can't read single images of the {what} loader, a {type(loaders).__name__}: give"
            " a torch DataLoader over a data set with a length, which makes the batches itself"
        )
    return loaders


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return the batch size of a loader; 0 if its data set gives whole batches."""
    if loader.batch_size is not None:
        return loader.batch_size
    return int(getattr(loader.batch_sampler, "batch_size", BATCH)) if loader.batch_sampler is not None else 0


def in_order(loader: DataLoader[Any], index: Sequence[int]) -> DataLoader[Any]:
    """Return a loader of some images of another's data set, in the order given."""
    return DataLoader(
        Subset(loader.dataset, index),
        batch_size=batch_size_of(loader),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )


def test_loaders(trainer: Trainer, module: LightningModule) -> Any:  # noqa: ANN401 - whatever Lightning takes
    """Return the test loaders of the datamodule, or of the module; None if neither has any."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and is_overridden("test_dataloader", data):
        data.setup("test")
        return data.test_dataloader()
    return module.test_dataloader() if is_overridden("test_dataloader", module) else None


def labelled(batch: Any) -> tuple[Any, Tensor]:  # noqa: ANN401 - whatever a foreign data set gives
    """Return inputs and labels of a batch.

    Raises:
        UserError: If it isn't (inputs, labels).
    """
    if not isinstance(batch, Sequence) or len(batch) < 2 or not isinstance(batch[1], Tensor) or batch[1].dim() != 1:
        raise UserError(f"a batch is not (inputs, labels) with a label an image: {OWN_EVALUATION}")
    return batch[0], batch[1]


def read_items(loader: DataLoader[Any], index: Sequence[int], seed: int) -> Any:  # noqa: ANN401 - what its batches are
    """Return some images of a loader's data set as one batch, augmented alike however they are shared out.

    Args:
        loader: Whose data set they are read from, and which makes a batch of them.
        index: Of the images.
        seed: Of the augmentation, with an image's own index.
    """
    items = []
    with isolate_rng():
        for i in index:
            draws = int(random_integers(seed, i))
            random.seed(draws)
            np.random.seed(draws % 2**32)
            torch.manual_seed(draws)
            items.append(loader.dataset[i])
    collate: Any = loader.collate_fn
    return collate(items)
