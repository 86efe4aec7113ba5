"""Datamodules: CIFAR-10 and CIFAR-100, any tree of class folders, and scikit-learn's digits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.folders import class_folders, read_class_folders
from kdq_lightning.data.images import ImageSet, canonical_set, joined, stratified_sample
from kdq_lightning.data.normalization import Channels
from kdq_lightning.errors import UserError
from kdq_lightning.files import remove_empty

_CIFAR = {
    "cifar10": (CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (CIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_SPLITS = ("train", "test")
_TEST_SHARE = 0.2  # of a folder without splits
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), from the official archive or from class folders."""

    def __init__(
        self,
        dataset: str = "cifar10",
        root: str | Path = "data",
        download: bool = True,
        mean: Channels | None = None,
        std: Channels | None = None,
        **options: Any,
    ) -> None:
        """Describe the data; no image is read yet.

        Args:
            dataset: cifar10 or cifar100.
            root: Folder of the official archive, or of `<dataset>/{train,test}/<class>/*.png`.
            download: Fetch the official archive into `root` if neither is there.
            mean: Channel means; those of the training set if not given.
            std: Channel standard deviations; those of the training set if not given.
            options: See ImageDataModule.

        Raises:
            UserError: If the data set is unknown or an option is out of its range.
        """
        if dataset not in _CIFAR:
            raise UserError(f"unknown dataset {dataset!r}: choose one of {', '.join(_CIFAR)}")
        self._archive, num_classes, default_mean, default_std = _CIFAR[dataset]
        super().__init__(
            dataset=dataset,
            num_classes=num_classes,
            image_size=32,
            mean=mean or default_mean,
            std=std or default_std,
            **options,
        )
        self.root = Path(root)
        self.download = download

    @property
    def _folders(self) -> Path:
        return self.root / self.dataset

    def prepare_data(self) -> None:
        """Download or unpack the official archive if there are no class folders.

        Raises:
            UserError: If there are no data and they can't be fetched.
        """
        if self._folders.is_dir():
            return
        try:
            self._unpack()
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"no {self.dataset} in {self.root} ({error}): put the official {self._archive.filename} or class "
                f"folders {self._folders}/{{train,test}}/<class>/*.png there, or try configs/quickstart.yaml, whose "
                "digits need no download"
            ) from error

    def _unpack(self) -> None:
        """Unpack the archive, downloaded if it isn't there; nothing is written if it is unpacked already."""
        try:
            self._archive(self.root, train=False)
        except RuntimeError:
            if not (self.download or check_integrity(self.root / self._archive.filename, self._archive.tgz_md5)):
                raise
            made = [place for place in (self.root, *self.root.parents) if not place.exists()]
            self.root.mkdir(parents=True, exist_ok=True)
            lock = self.root / f".{self.dataset}.lock"
            try:
                with FileLock(lock):  # several runs of a study may want it at once
                    self._archive(self.root, train=False, download=True)
            except (OSError, RuntimeError):
                lock.unlink(missing_ok=True)
                remove_empty(made)
                raise

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return training and test set from whichever source is there."""
        if self._folders.is_dir():
            train, test = (self._folders / split for split in ("train", "test"))
            names = class_folders(train)
            if len(names) != self.num_classes:
                raise UserError(f"{train} has {len(names)} class folders, and {self.dataset} has {self.num_classes}")
            return read_class_folders(train, names, 32), read_class_folders(test, names, 32)
        self.prepare_data()
        return self._read_archive(train=True), self._read_archive(train=False)

    def _read_archive(self, train: bool) -> ImageSet:
        archive = self._archive(self.root, train=train)
        return canonical_set(archive.data, np.asarray(archive.targets, dtype=np.int64), archive.classes)


class ImageFolderDataModule(ImageDataModule):
    """Any tree `{train,test}/<class>/<image>` or `{train,val,test}/<class>/<image>`, or one folder `<class>/<image>`.

    One folder alone is split: a stratified fifth is the test set, the same for every seed of a run.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 32,
        mean: Channels = _IMAGENET_MEAN,
        std: Channels = _IMAGENET_STD,
        val_size: int | float = 0.1,
        **options: Any,
    ) -> None:
        """Count the class folders; no image is read yet.

        Args:
            root: Folder that holds `train`, `test` and perhaps `val`, or the folders of the classes.
            image_size: Side in pixels that images are scaled and cropped to.
            mean: Channel means; ImageNet's if not given.
            std: Channel standard deviations; ImageNet's if not given.
            val_size: Images kept from training for validation: a count, or a fraction below 1. Not used where there is
                a folder `val`.
            options: See ImageDataModule.

        Raises:
            UserError: If there are no class folders, or an option is out of its range.
        """
        self.root = Path(root).expanduser()
        self._is_split = any((self.root / split).is_dir() for split in ("train", "test"))
        self._names = class_folders(self.root / "train" if self._is_split or not self.root.is_dir() else self.root)
        super().__init__(
            dataset=self.root.resolve().name,
            num_classes=len(self._names),
            image_size=image_size,
            mean=mean,
            std=std,
            val_size=val_size,
            **options,
        )

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return training and test set; the images of a folder `val` are among the training set."""
        if not self._is_split:
            return self._read_one_folder()
        train, test = (read_class_folders(self.root / split, self._names, self.image_size) for split in _SPLITS)
        if (self.root / "val").is_dir():
            val = read_class_folders(self.root / "val", self._names, self.image_size, may_lack_classes=True)
            train, self.val_index = joined(train, val)
        return train, test

    def _read_one_folder(self) -> tuple[ImageSet, ImageSet]:
        whole = read_class_folders(self.root, self._names, self.image_size, cache=self.root)
        is_test = torch.zeros(len(whole), dtype=torch.bool)
        is_test[stratified_sample(whole.labels, round(_TEST_SHARE * len(whole)), self.split_seed)] = True
        train, test = (whole.take(chosen.nonzero().squeeze(1)) for chosen in (~is_test, is_test))
        note = f"{self.root} has no folders train and test: {len(test)} of its images are the test set"
        return replace(train, notes=(*whole.notes, note)), test


class DigitsDataModule(ImageDataModule):
    """Scikit-learn's 1,797 real handwritten digits (Alpaydin and Kaynak 1998): nothing to download."""

    def __init__(
        self,
        val_size: int | float = 0.1,
        crop: int = 1,
        flip: bool = False,
        mean: Channels = (0.3051, 0.3051, 0.3051),
        std: Channels = (0.3756, 0.3756, 0.3756),
        **options: Any,
    ) -> None:
        """Describe the data; no image is read yet.

        Args:
            val_size: Images kept from training for validation: a count, or a fraction below 1.
            crop: Largest random shift in pixels, 0 for none.
            flip: Mirror every other image, which makes other digits of them.
            mean: Channel means; those of the training set if not given.
            std: Channel standard deviations; those of the training set if not given.
            options: See ImageDataModule.
        """
        super().__init__(
            dataset="digits",
            num_classes=10,
            image_size=16,
            mean=mean,
            std=std,
            val_size=val_size,
            crop=crop,
            flip=flip,
            **options,
        )

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Return training and test set: a stratified fifth is the test set, whatever the seed."""
        from sklearn.datasets import load_digits  # slow to import, and only the digits need it

        digits = load_digits()
        grey = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)
        grey = grey.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        pixels = grey[..., None].expand(-1, -1, -1, 3).numpy()
        is_test = np.zeros(len(pixels), dtype=bool)
        is_test[stratified_sample(torch.from_numpy(digits.target), len(pixels) // 5, seed=0)] = True
        names = [str(digit) for digit in range(10)]
        train, test = (canonical_set(pixels[p], digits.target[p].astype(np.int64), names) for p in (~is_test, is_test))
        return train, test
