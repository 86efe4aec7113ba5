"""`kdq bench data`: our loader and augmentation against torchvision's pipeline of PIL images, on one thread."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kdq_lightning.bench.measure import Timing, hardware, interleaved, print_table
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.images import ImageSet

_SIDE = 32
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_REFERENCE = "PIL: crop, flip"


class NoiseDataModule(ImageDataModule):
    """Random images of CIFAR's size, which load as fast as real ones."""

    def __init__(self, images: Tensor, batch_size: int, cutout: int = 0) -> None:
        """Take the images.

        Args:
            images: uint8, (images, 3, 32, 32).
            batch_size: Images a batch.
            cutout: Side in pixels of the square that is painted over, 0 for none.
        """
        super().__init__(
            dataset="noise", num_classes=10, image_size=_SIDE, mean=_MEAN, std=_STD, batch_size=batch_size, val_size=0,
            cutout=cutout,
        )  # fmt: skip
        self._images = images
        self.setup()

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the same images as training and as test set."""
        split = ImageSet(self._images, torch.arange(len(self._images)) % 10, ["noise"] * 10)
        return split, split

    def epoch(self) -> None:
        """Load, augment and normalise every image once."""
        for batch in self.train_dataloader():
            self.normalize(self.training_view(batch, epoch=0, epochs=1).images)


class _PillowImages(Dataset[tuple[Tensor, int]]):
    """Images that are read and augmented one by one, as torchvision.datasets.CIFAR10 does it."""

    def __init__(self, images: Tensor, *operations: Callable[[Any], Any]) -> None:
        self._arrays = images.permute(0, 2, 3, 1).numpy()
        # The first generation of transforms: on PIL images it is the faster one.
        self._transform = transforms.Compose([
            transforms.RandomCrop(_SIDE, padding=4), transforms.RandomHorizontalFlip(), *operations,
            transforms.ToTensor(), transforms.Normalize(_MEAN, _STD),
        ])  # fmt: skip

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._arrays[place])), 0

    def __len__(self) -> int:
        return len(self._arrays)

    def epoch(self, batch_size: int) -> None:
        """Load every image once."""
        for _ in DataLoader(self, batch_size, shuffle=True):
            pass


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `kdq bench data`."""
    parser.add_argument("--batch_size", type=int, default=512, help="Images a batch.")
    parser.add_argument("--images", type=int, default=10_240, help="Images that our loader reads in one repeat.")
    parser.add_argument("--repeats", type=int, default=5, help="Repeats, interleaved; medians are printed.")


def run(options: Namespace) -> dict[str, Any]:
    """Measure the pipelines, print a table, and return its figures.

    Args:
        options: Those that `add_arguments` adds.

    Returns:
        `hardware`, and `pipelines`: images/s (median, slowest, fastest) and ratio to the plain PIL pipeline, by name.
    """
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (options.images, 3, _SIDE, _SIDE), dtype=torch.uint8)
    few = images[: options.batch_size]  # enough for the slow pipelines
    ours = partial(NoiseDataModule, images, options.batch_size)
    timings = interleaved(
        {
            _REFERENCE: partial(_PillowImages(few).epoch, options.batch_size),
            "ours: crop, flip": ours().epoch,
            "ours: crop, flip, cutout": ours(cutout=8).epoch,
        },
        options.repeats,
    )
    pipelines = {name: _speed(timing, len(few if "PIL" in name else images)) for name, timing in timings.items()}
    for speed in pipelines.values():
        speed["ratio"] = speed["images_per_second"] / pipelines[_REFERENCE]["images_per_second"]
    print_table(
        f"Loading and augmentation, batch {options.batch_size}, with normalisation",
        ["pipeline", "images/s", "range", "times PIL"],
        [
            [name, f"{s['images_per_second']:,.0f}", f"{s['slowest']:,.0f}-{s['fastest']:,.0f}", f"{s['ratio']:.1f}"]
            for name, s in pipelines.items()
        ],
    )
    return {"hardware": hardware(), "pipelines": pipelines}


def _speed(timing: Timing, images: int) -> dict[str, float]:
    return {
        "images_per_second": images / timing.median,
        "slowest": images / timing.slowest,
        "fastest": images / timing.fastest,
    }
