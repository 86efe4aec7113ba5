"""The base class of all data sets: images in memory, whole batches, augmentation on the device.

It also makes the validation split and chooses the calibration images.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from kdq_lightning.data.augmentation import View, augment
from kdq_lightning.data.folders import read_any_folder
from kdq_lightning.data.images import Batch, ImageSet, stratified_sample
from kdq_lightning.data.normalization import Channels, Statistics, normalize, to_unit_range
from kdq_lightning.data.sampler import GlobalBatchSampler, ResumableLoader
from kdq_lightning.errors import UserError, check_range


class ImageDataModule(LightningDataModule, ABC):
    """Images in memory, whole uint8 batches to the device; there they are augmented and become floats in [0, 1].

    Normalising is left to the networks, each of which may expect other statistics. `statistics` are those of the data,
    which a network that is trained on them takes over.

    A data set is a subclass: its `__init__` passes on classes, size and statistics, and `read` returns the images.
    """

    def __init__(
        self,
        *,
        dataset: str,
        num_classes: int,
        image_size: int,
        mean: Channels,
        std: Channels,
        batch_size: int = 128,
        val_size: int | float = 5000,
        train_size: int | float | None = None,
        crop: int = 4,
        flip: bool | Literal["alternate"] = True,
        cutout: int = 0,
        trivial_augment: bool = False,
        image_sizes: list[int] | None = None,
        seed: int | None = None,
        split_seed: int = 0,
    ) -> None:
        """Describe the data; no image is read yet.

        Args:
            dataset: Name of the data in records.
            num_classes: Number of classes.
            image_size: Side of the stored images in pixels.
            mean: Channel means of images in [0, 1], subtracted.
            std: Channel standard deviations of images in [0, 1], divided by.
            batch_size: Images a step, over all processes.
            val_size: Images kept from training for validation: a count, or a fraction below 1.
            train_size: Images to train on, a stratified sample of those that are not for validation: a count, or a
                fraction below 1; all if not given.
            crop: Largest random shift in pixels, 0 for none.
            flip: Mirror every other image; `alternate` mirrors each in every second epoch.
            cutout: Side in pixels of the square painted over with the mean colour, 0 for none.
            trivial_augment: Retired; old configs hold `false`.
            image_sizes: Sides in pixels that the trained network gets training images at, spread evenly over the run's
                epochs; a teacher sees the same views whole.
            seed: Seed of order and views; the run's seed if not given.
            split_seed: Seed of the validation split, of the `train_size` images and of the calibration images, whatever
                the run's seed.

        Raises:
            UserError: If an option is out of its range.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if trivial_augment:
            raise UserError("trivial_augment is no longer there: leave it out, and use crop, flip and cutout")
        if crop < 0 or cutout < 0:
            raise UserError(f"crop and cutout are pixels, 0 or more, got {crop} and {cutout}")
        if image_sizes is not None and not all(1 <= size <= image_size for size in image_sizes or [0]):
            raise UserError(f"image_sizes must be between 1 and {image_size}, the stored size, got {image_sizes}")
        self.dataset = dataset
        self.num_classes = num_classes
        self.image_size = image_size
        self.statistics = Statistics(tuple(mean), tuple(std))
        self.statistics.check()
        self.batch_size = batch_size
        self.val_size = val_size
        self.train_size = train_size
        self.crop = crop
        self.flip = flip
        self.cutout = cutout
        self.image_sizes = image_sizes
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.split_seed = split_seed
        # Some ranks have nothing of a small last evaluation batch.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.notes: list[str] = []  # on the data, for the user
        self.val_index: Tensor = None  # type: ignore[assignment]  # setup chooses, unless `read` has set it
        self._images_to_predict: ImageSet | None = None
        self._is_set_up = False
        self._train_sampler: GlobalBatchSampler | None = None
        self._position: dict[str, int] = {}

    @abstractmethod
    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return the whole training set and the test set, each in canonical order.

        Where the data say which images are for validation, these are among the training set, and `read` sets
        `val_index` to their indices.
        """

    def setup(self, stage: str | None = None) -> None:
        """Read all images, once, and split off the validation images.

        Raises:
            UserError: If the data are missing or broken, or the validation split would leave no training image.
        """
        if self._is_set_up:
            return
        try:
            train_set, test_set = self.read()
        except OSError as error:
            raise UserError(f"the images of {self.dataset} can't be read ({error}): check their folder") from error
        self.train_set, self.test_set = train_set, test_set
        self.notes += [*train_set.notes, *test_set.notes]
        total = len(self.train_set)
        if self.val_index is None:
            self.val_index = self._choose_validation()
        is_training = torch.ones(total, dtype=torch.bool)
        is_training[self.val_index] = False
        self.train_index = self._choose_training(is_training.nonzero().squeeze(1))
        self._note_missing_classes()
        if stage == "fit" and self.batch_size > len(self.train_index):
            self.notes.append(
                f"a step takes all {len(self.train_index):,} training images: data.batch_size is {self.batch_size:,}"
            )
        self._is_set_up = True

    def _choose_validation(self) -> Tensor:
        """Return the canonical indices of the validation images, in ascending order."""
        total = len(self.train_set)
        size = self.val_size * total if self.val_size < 1 else self.val_size
        if not 0 <= size <= total - 1:
            raise UserError(f"val_size {self.val_size} doesn't fit the {total} training images of {self.dataset}")
        return stratified_sample(self.train_set.labels, round(size), self.split_seed).sort().values

    def _choose_training(self, index: Tensor) -> Tensor:
        """Return those of the canonical indices of a split that are trained on, in ascending order."""
        if self.train_size is None:
            return index
        size = self.train_size * len(index) if self.train_size < 1 else self.train_size
        if not 1 <= size <= len(index):
            raise UserError(
                f"train_size {self.train_size} doesn't fit the {len(index)} images of {self.dataset} that are not for"
                " validation"
            )
        return index[stratified_sample(self.train_set.labels[index], round(size), self.split_seed).sort().values]

    def _note_missing_classes(self) -> None:
        counts = self.train_set.labels[self.train_index].bincount(minlength=self.num_classes)
        missing = [self.train_set.class_names[label] for label in (counts == 0).nonzero().flatten().tolist()]
        if missing:
            first = missing[0].encode("utf-8", "backslashreplace").decode()
            others = f" and of {len(missing) - 1} other classes" if len(missing) > 1 else ""
            why, remedy = "all images of class {} are kept for validation, none is trained on", "smaller data.val_size"
            if self.train_size is not None:
                why, remedy = "no image of class {} is trained on", "larger data.train_size"
            self.notes.append(f"{why.format(first + others)}: add images, or give a {remedy}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of the stored images."""
        return len(self.statistics.mean), self.image_size, self.image_size

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes by label; they are known after setup."""
        return self.train_set.class_names

    def calibration_images(self, count: int) -> tuple[Tensor, Tensor]:
        """Return training images for quantization: stratified, not augmented, the same for every seed of a run.

        Where there are fewer training images than asked for, all of them are taken, and a note says so.

        Args:
            count: Number of images.

        Returns:
            uint8 images (images, channels, h, w) in random order, and their canonical indices (images,).

        Raises:
            UserError: If the number is not at least 1.
        """
        check_range("calibration_images", count, low=1, including_low=True)
        if count > len(self.train_index):
            note = f"all {len(self.train_index)} training images are calibrated on: {count} are asked for"
            self.notes += [note] * (note not in self.notes)
            count = len(self.train_index)
        labels = self.train_set.labels[self.train_index]
        index = self.train_index[stratified_sample(labels, count, self.split_seed)]
        return self.train_set.images[index], index

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader of shuffled training batches; it resumes in the middle of an epoch.

        Raises:
            UserError: If image sizes are to change over an unknown number of epochs, or the order is overruled.
        """
        if self.trainer and self.image_sizes and (self.trainer.max_epochs or 0) < 1:
            raise UserError("image_sizes are spread over the run's epochs: give max_epochs instead of max_steps")
        if getattr(self.trainer, "overfit_batches", 0):  # set by Lightning, unknown to its type
            raise UserError("overfit_batches would replace the order of the images: use limit_train_batches instead")
        self._train_sampler = sampler = self._sampler(self.train_index, shuffle=True, drop_last=True)
        if self._position:
            sampler.load_state_dict(self._position)
            self._position = {}
        return ResumableLoader(self.train_set, sampler=sampler, batch_size=None, collate_fn=_as_it_is)

    def state_dict(self) -> dict[str, int]:
        """Return the position within the epoch, for the checkpoint."""
        return self._train_sampler.state_dict() if self._train_sampler else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader begin at a position that `state_dict` returned.

        Lightning restores a loader's own state only if nothing asked for the number of steps before, as our learning
        rate's schedule does.
        """
        self._position = state_dict

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the validation images in canonical order."""
        return self._evaluation_loader(self.train_set, self.val_index)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test images in canonical order."""
        return self._evaluation_loader(self.test_set, torch.arange(len(self.test_set)))

    @property
    def predicted_set(self) -> ImageSet:
        """Return the images to predict: those of the folder `images`, the test images if it is not given."""
        return self.test_set if self._images_to_predict is None else self._images_to_predict

    def predict_folder(self, folder: Path) -> None:
        """Predict the images in a folder instead of the test images.

        Args:
            folder: Images lie in it and in its folders; one in a folder that is named after a class has this label.

        Raises:
            UserError: If there is no image, or one can't be read.
        """
        self.setup("predict")
        self._images_to_predict = read_any_folder(folder, self.class_names, self.image_size)
        self.notes += self._images_to_predict.notes

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the images to predict; see `predicted_set`."""
        return self._evaluation_loader(self.predicted_set, torch.arange(len(self.predicted_set)))

    def _evaluation_loader(self, images: ImageSet, index: Tensor) -> DataLoader[Batch]:
        return DataLoader(images, sampler=self._sampler(index), batch_size=None, collate_fn=_as_it_is)

    def _sampler(self, index: Tensor, shuffle: bool = False, drop_last: bool = False) -> GlobalBatchSampler:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return GlobalBatchSampler(
            index,
            self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Return images (batch, channels, h, w) normalised by the data's own statistics; see `normalize`."""
        return normalize(images, self.statistics)

    def training_view(self, batch: Batch, epoch: int, epochs: int) -> View:
        """Return the view of a batch of bytes that training sees.

        Args:
            batch: uint8 images with labels and indices.
            epoch: Epoch that the view belongs to.
            epochs: Epochs of the whole run.
        """
        images = augment(
            batch.images,
            batch.index,
            seed=self.seed,
            epoch=epoch,
            crop=self.crop,
            flip=self.flip,
            cutout=self.cutout,
            fill=tuple(round(255 * value) for value in self.statistics.mean),
        )
        return View(to_unit_range(images), batch.labels, batch.index, self.training_size(epoch, epochs))

    def view_key(self) -> dict[str, object]:
        """Return what the training views depend on beside the epoch, as plain data; it is known after setup."""
        digest = hashlib.blake2b(self.train_set.images.numpy().data, digest_size=8)
        digest.update(self.train_index.numpy().data)
        return {
            "images": digest.hexdigest(),
            **{name: getattr(self, name) for name in ("seed", "batch_size", "crop", "flip", "cutout")},
            "trivial_augment": False,  # retired, and in the key of answers that are kept already
            "statistics of views": list(self.statistics),
        }

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch | View:
        """Return images in [0, 1] on their device: while training a `View`, otherwise the batch as it is stored."""
        if not (self.trainer and self.trainer.training):
            return batch._replace(images=to_unit_range(batch.images))
        return self.training_view(batch, self.trainer.current_epoch, self.trainer.max_epochs or 1)

    def training_size(self, epoch: int, epochs: int) -> int:
        """Return the training image size for this epoch, in pixels.

        Args:
            epoch: The epoch.
            epochs: Epochs of the whole run.
        """
        return self.image_sizes[epoch * len(self.image_sizes) // epochs] if self.image_sizes else self.image_size


def _as_it_is(batch: Any) -> Any:  # noqa: ANN401 - torch types collate_fn as if it always got lists
    return batch
