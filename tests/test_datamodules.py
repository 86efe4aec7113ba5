"""Three sources, one contract: order, splits and statistics; cache and sentences for what users get wrong."""

import hashlib
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torchvision.datasets import CIFAR10

from kdq_lightning.data import datamodules, folders
from kdq_lightning.data.augmentation import augment
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule, ImageFolderDataModule
from kdq_lightning.data.images import stratified_sample
from kdq_lightning.errors import UserError

SHARED = Path(os.environ.get("KDQ_SHARED", Path(__file__).resolve().parents[2] / "shared"))
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def pixels():
    """80 training and 30 test images (n, 32, 32, 3) with their labels; one image stands there twice."""
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (80, 30))
    train[50] = train[10]
    return {"train": (train, np.arange(80) % 10), "test": (test, np.arange(30) % 10)}


def write_folders(root, pixels, seed=0):
    """Class folders whose file names say nothing of the order."""
    generator = np.random.default_rng(seed)
    for split, (images, labels) in pixels.items():
        for name, image, label in zip(generator.permutation(len(images)), images, labels, strict=True):
            folder = root / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{name}.png")
    return root


@pytest.fixture
def archive(tmp_path, pixels, monkeypatch):
    """The official layout in miniature, with checksums of its own; returns its root."""
    base = tmp_path / "archive" / CIFAR10.base_folder
    base.mkdir(parents=True)

    def dump(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def entry(split, part):
        images, labels = pixels[split]
        flat = images[part].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return {"data": flat, "labels": labels[part].tolist()}

    class Miniature(CIFAR10):
        train_list = [dump(f"data_batch_{i}", entry("train", slice(i, None, 5))) for i in range(5)]  # noqa: RUF012
        test_list = [dump("test_batch", entry("test", slice(None)))]  # noqa: RUF012
        meta_md5 = dump("batches.meta", {"label_names": NAMES})[1]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": meta_md5}  # noqa: RUF012
        url = "http://127.0.0.1:9/cifar-10-python.tar.gz"

    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as tar:
        tar.add(base, CIFAR10.base_folder)
    Miniature.tgz_md5 = hashlib.md5((tmp_path / "cifar.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(datamodules._CIFAR, "cifar10", (Miniature, *datamodules._CIFAR["cifar10"][1:]))
    return base.parent


def cifar(root, **options):
    data = CIFARDataModule("cifar10", root, **{"val_size": 20, "batch_size": 16, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def equal(a, b):
    return (
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.class_names == b.class_names
    )  # fmt: skip


def test_archive_and_folders_are_the_same_data(tmp_path, archive, pixels):
    official = cifar(archive)
    folder = write_folders(tmp_path / "tree" / "cifar10", pixels).parent
    unpacked = cifar(folder)
    for split in ("train_set", "test_set"):
        assert equal(getattr(official, split), getattr(unpacked, split))
    assert torch.equal(official.val_index, unpacked.val_index)
    assert official.class_names == NAMES

    images, labels = pixels["train"]
    expected = sorted((label, image.transpose(2, 0, 1).tobytes()) for image, label in zip(images, labels, strict=True))
    loaded = zip(official.train_set.labels.tolist(), official.train_set.images.numpy(), strict=True)
    assert sorted((label, image.tobytes()) for label, image in loaded) == expected
    assert official.train_set.labels.tolist() == sorted(labels)


def test_packed_archive_alone_is_enough_without_network(tmp_path, archive):
    root = tmp_path / "packed"
    root.mkdir()
    (tmp_path / "cifar.tar.gz").rename(root / CIFAR10.filename)
    assert equal(cifar(root, download=False).test_set, cifar(archive).test_set)


def test_runs_that_start_together_unpack_once(tmp_path, archive, monkeypatch):
    """A run that finds another unpacking waits, then reads what that one has unpacked."""
    root = tmp_path / "packed"
    root.mkdir()
    (tmp_path / "cifar.tar.gz").rename(root / CIFAR10.filename)
    miniature, unpacking, begun = datamodules._CIFAR["cifar10"][0], [], threading.Event()
    unpack = miniature.download

    def slowly(dataset):
        if dataset._check_integrity():
            return
        unpacking.append(1)
        batches = root / CIFAR10.base_folder
        batches.mkdir()
        (batches / "data_batch_1").write_bytes(b"half of it")
        begun.set()
        time.sleep(0.5)
        unpack(dataset)

    monkeypatch.setattr(miniature, "download", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cifar, root)
        assert begun.wait(10)
        second = pool.submit(cifar, root)
        assert equal(first.result().train_set, second.result().train_set)
    assert len(unpacking) == 1


def test_unpacked_archive_is_read_where_nothing_can_be_written(archive, monkeypatch):
    monkeypatch.setattr(datamodules, "FileLock", None)
    assert len(cifar(archive).test_set.labels) == 30


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("packed", [None, b"half a download"])
def test_no_data_and_no_network(tmp_path, archive, download, packed):
    root = tmp_path / "empty"
    root.mkdir()
    if packed:
        (root / CIFAR10.filename).write_bytes(packed)
    data = CIFARDataModule(root=root, download=download)
    assert data.num_classes == 10 and data.statistics.mean == (0.4914, 0.4822, 0.4465)
    with pytest.raises(UserError, match=r"no cifar10 in .*configs/quickstart.yaml"):
        data.prepare_data()


@pytest.mark.parametrize("there", [None, "images.txt"])
def test_a_failed_download_leaves_nothing(tmp_path, archive, there):
    """Folders that it made, and the lock; what was there stays."""
    place = tmp_path / "place"
    place.mkdir()
    root = place / "new" / "data"
    if there:
        root.mkdir(parents=True)
        (root / there).touch()
    with pytest.raises(UserError, match=r"no cifar10 in "):
        CIFARDataModule(root=root).prepare_data()
    assert [path.name for path in place.rglob("*")] == (["new", "data", there] if there else [])


def test_broken_archive(archive):
    (archive / CIFAR10.base_folder / "data_batch_3").write_bytes(b"")
    with pytest.raises(UserError, match=r"no cifar10 in .*corrupted"):
        cifar(archive, download=False)


def test_validation_is_stratified_disjoint_and_fixed(archive):
    data, other = cifar(archive, seed=0), cifar(archive, seed=1)
    train, val = data.train_index, data.val_index
    assert sorted(torch.cat([train, val]).tolist()) == list(range(80))
    assert data.train_set.labels[val].bincount().tolist() == [2] * 10
    assert torch.equal(val, other.val_index)
    assert not torch.equal(val, cifar(archive, split_seed=1).val_index)
    assert len(cifar(archive, val_size=0.25).val_index) == 20
    for size in (80, 5000, -1):
        with pytest.raises(UserError, match="val_size"):
            cifar(archive, val_size=size)


def test_stratified_sample_splits_remainders_by_size():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    for count in (0, 1, 7, 33, 99, 100):
        chosen = stratified_sample(labels, count, seed=4)
        assert len(set(chosen.tolist())) == count
        counts = labels[chosen].bincount(minlength=3)
        assert ((counts - torch.tensor([0.5, 0.3, 0.2]) * count).abs() < 1).all()
    assert labels[stratified_sample(labels, 33, seed=4)].bincount().tolist() == [16, 10, 7]  # of 16.5, 9.9, 6.6
    assert not torch.equal(stratified_sample(labels, 33, seed=4).sort()[0], stratified_sample(labels, 33, 5).sort()[0])


def test_calibration_images(archive):
    data = cifar(archive)
    images, index = data.calibration_images(30)
    assert images.dtype == torch.uint8 and torch.equal(images, data.train_set.images[index])
    assert not set(index.tolist()) & set(data.val_index.tolist())
    assert data.train_set.labels[index].bincount().tolist() == [3] * 10
    assert torch.equal(index, cifar(archive, seed=9).calibration_images(30)[1])
    assert data.notes == []
    for _ in range(2):
        assert sorted(data.calibration_images(61)[1].tolist()) == data.train_index.tolist()
    assert data.notes == ["all 60 training images are calibrated on: 61 are asked for"], "said once"
    with pytest.raises(UserError, match="calibration_images must be at least 1"):
        data.calibration_images(0)


def test_loaders(archive):
    data = cifar(archive, seed=3)
    train = list(data.train_dataloader())
    assert [len(batch.labels) for batch in train] == [16, 16, 16]
    assert {batch.images.dtype for batch in train} == {torch.uint8}
    for loader, images, index in (
        (data.val_dataloader(), data.train_set, data.val_index),
        (data.test_dataloader(), data.test_set, torch.arange(30)),
        (data.predict_dataloader(), data.test_set, torch.arange(30)),
    ):
        batches = list(loader)
        assert torch.equal(torch.cat([batch.index for batch in batches]), index)
        assert torch.equal(torch.cat([batch.images for batch in batches]), images.images[index])
        assert torch.equal(torch.cat([batch.labels for batch in batches]), images.labels[index])


def test_batches_are_augmented_in_training_alone(archive):
    data = cifar(archive, seed=3, cutout=8, image_sizes=[16, 24, 32])
    batch = next(iter(data.train_dataloader()))
    plain = batch.images / torch.tensor(255.0)
    assert torch.equal(data.on_after_batch_transfer(batch, 0).images, plain)
    data.trainer = SimpleNamespace(training=False, current_epoch=0)
    assert torch.equal(data.on_after_batch_transfer(batch, 0).images, plain)
    data.trainer = SimpleNamespace(training=True, current_epoch=4, max_epochs=5)
    view = data.on_after_batch_transfer(batch, 0)
    bytes_seen = augment(batch.images, batch.index, seed=3, epoch=4, crop=4, flip=True, cutout=8, fill=(125, 123, 114))
    assert torch.equal(view.images, bytes_seen / torch.tensor(255.0))
    assert view.labels is batch.labels and view.index is batch.index
    assert view.size == 32 and view.resized is view.images
    data.trainer = SimpleNamespace(training=True, current_epoch=0, max_epochs=5)
    assert data.on_after_batch_transfer(batch, 0).resized.shape == (16, 3, 16, 16)


def test_sizes_are_spread_over_the_epochs(archive):
    data = cifar(archive, image_sizes=[16, 24, 32])
    assert [data.training_size(epoch, 5) for epoch in range(5)] == [16, 16, 24, 24, 32]
    assert cifar(archive).training_size(0, 5) == 32


def test_trainer_options_that_do_not_fit(archive):
    data = cifar(archive, image_sizes=[16])
    for options, sentence in (({"max_epochs": -1}, "max_epochs"), ({"overfit_batches": 2}, "limit_train_batches")):
        data.trainer = SimpleNamespace(**{"max_epochs": 1, "overfit_batches": 0, **options})
        with pytest.raises(UserError, match=sentence):
            data.train_dataloader()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"crop": -1},
        {"cutout": -1},
        {"image_sizes": []},
        {"image_sizes": [64]},
        {"image_sizes": [32, 0]},
        {"std": (1, 0, 1)},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=next(iter(options))):
        CIFARDataModule(**options)


def test_unknown_dataset():
    with pytest.raises(UserError, match="'mnist': choose one of cifar10, cifar100"):
        CIFARDataModule("mnist")


def test_seed_is_the_runs_own_unless_given(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert DigitsDataModule().seed == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert DigitsDataModule().seed == 17
    assert DigitsDataModule(seed=5).seed == 5


def test_fewer_images_to_train_on(archive):
    """They are a stratified sample of those not kept for validation, which stay the same; the seed changes neither."""
    whole, few = cifar(archive), cifar(archive, train_size=20)
    assert torch.equal(few.val_index, whole.val_index)
    assert set(few.train_index.tolist()) < set(whole.train_index.tolist())
    assert few.train_index.tolist() == sorted(few.train_index.tolist())
    assert few.train_set.labels[few.train_index].bincount().tolist() == [2] * 10
    assert torch.equal(few.train_index, cifar(archive, train_size=20, seed=1).train_index)
    assert not torch.equal(few.train_index, cifar(archive, train_size=20, split_seed=1).train_index)
    assert len(cifar(archive, train_size=0.5).train_index) == 30
    assert set(few.calibration_images(12)[1].tolist()) <= set(few.train_index.tolist())
    assert few.view_key() != whole.view_key()
    lacking = [note for note in cifar(archive, train_size=5).notes if "data.train_size" in note]
    assert len(lacking) == 1 and lacking[0].startswith("no image of class") and "4 other classes" in lacking[0]
    for size in (0, 61, -1, float("nan")):
        with pytest.raises(UserError, match="train_size"):
            cifar(archive, train_size=size)


def test_digits():
    data = DigitsDataModule()
    data.setup()
    total, test = len(data.train_set) + len(data.test_set), len(data.test_set)
    assert (total, test) == (1797, 359)
    images = data.train_set.images.double() / 255
    assert images.shape[1:] == (3, data.image_size, data.image_size)
    assert torch.equal(images[:, 0], images[:, 2])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.tensor(data.statistics.mean).double(), atol=6e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.tensor(data.statistics.std).double(), atol=6e-5, rtol=0)
    assert data.test_set.labels.bincount().min() >= 34
    assert data.class_names == list("0123456789")
    again = DigitsDataModule(seed=3, split_seed=3)
    again.setup()
    assert equal(again.test_set, data.test_set)


def test_image_folder_of_any_size(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(["cats", "dogs"]):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(4):
                picture = Image.new("RGB", (40 + i, 60), (0, 255 * label, 0))
                picture.paste((255, 0, 0), (0, 0, 60, 8))  # cut away: the middle square is kept
                picture.save(tmp_path / "pets" / split / name / f"{i}.jpg", quality=95)
    (tmp_path / "pets" / "train" / ".cache").mkdir()
    (tmp_path / "pets" / "train" / "cats" / ".DS_Store").write_text("not an image")
    data = ImageFolderDataModule(tmp_path / "pets", image_size=16, val_size=2)
    assert (data.dataset, data.num_classes, data.statistics.std) == ("pets", 2, (0.229, 0.224, 0.225))
    data.setup()
    assert data.class_names == ["cats", "dogs"]
    assert data.train_set.images.shape == (8, 3, 16, 16)
    assert data.train_set.images[4:, 1].float().mean() > 250 and data.train_set.images[:, 0].float().mean() < 5


@pytest.fixture
def tree(tmp_path, pixels):
    return write_folders(tmp_path / "tree" / "cifar10", pixels)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda tree: [p.unlink() for p in (tree / "test/dog").iterdir()], "no images of class 'dog' in .*test"),
        (lambda tree: (tree / "test/dog").rename(tree / "dog"), "no images of class 'dog' in .*test"),
        (lambda tree: (tree / "test/wolf").mkdir(), "wolf is not a class"),
        (lambda tree: (tree / "train/wolf").mkdir(), "11 class folders, and cifar10 has 10"),
        (lambda tree: (tree / "train").rename(tree / "training"), "no class folders in .*train.*quickstart"),
        (lambda tree: (tree / "train/dog/notes.txt").write_text("hello"), "notes.txt is not a readable image"),
        (lambda tree: (tree / "train/dog/x.png").symlink_to(tree / "nowhere"), "x.png"),
        (lambda tree: cut(next((tree / "test/cat").iterdir())), "test/cat/.*png is not a readable image"),
    ],
)
def test_spoiled_folders(tree, spoil, sentence):
    spoil(tree)
    with pytest.raises(UserError, match=sentence) as caught:
        cifar(tree.parent)
    assert "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def read(tree, split="train"):
    return folders.read_class_folders(tree / split, NAMES, 32)


def cached(tree):
    return tree / ".train-32px.safetensors"


def test_cache_is_used_and_right(tree, monkeypatch):
    fresh = read(tree)
    monkeypatch.setattr(folders, "decode_files", None)
    assert equal(read(tree), fresh)
    assert sorted(p.name for p in tree.iterdir()) == [".train-32px.safetensors", "test", "train"]


def flip_a_bit(tree):
    content = bytearray(cached(tree).read_bytes())
    content[-1000] ^= 1
    cached(tree).write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda tree: cut(cached(tree)), lambda tree: cached(tree).write_bytes(b"")]
)
def test_damaged_cache_is_rebuilt(tree, damage, monkeypatch):
    fresh = read(tree)
    damage(tree)
    assert equal(read(tree), fresh)
    monkeypatch.setattr(folders, "decode_files", None)
    assert equal(read(tree), fresh)


def test_stale_cache_is_rebuilt(tree):
    before = read(tree)
    victim = next((tree / "train/dog").iterdir())
    Image.new("RGB", (32, 32), (1, 2, 3)).save(victim)
    changed = read(tree)
    assert not equal(changed, before)
    assert (changed.images[changed.labels == 5] == torch.tensor([1, 2, 3]).view(3, 1, 1)).all((1, 2, 3)).sum() == 1
    victim.unlink()
    assert len(read(tree)) == 79
    victim.with_name("renamed.png").write_bytes(next((tree / "train/cat").iterdir()).read_bytes())
    assert len(read(tree)) == 80


def test_unwritable_folder_means_no_cache(tree, monkeypatch):
    fresh = read(tree)
    cached(tree).unlink()
    cached(tree).mkdir()  # stands in the way, also of root
    assert equal(read(tree), fresh)
    assert sorted(p.name for p in tree.iterdir()) == [".train-32px.safetensors", "test", "train"]
    cached(tree).rmdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert equal(read(tree), fresh)
    assert not cached(tree).exists()


def _read_in_turn(tree, barrier, queue):
    barrier.wait()
    queue.put(read(tree).images.double().sum().item())


def test_two_processes_build_the_cache_at_once(tree):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_read_in_turn, args=(tree, barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sums == [read(tree).images.double().sum().item()] * 2
    assert sorted(p.name for p in tree.iterdir()) == [".train-32px.safetensors", "test", "train"]


class Seen(LightningModule):
    """Returns what it is given."""

    def predict_step(self, batch, batch_idx):
        return batch


def test_lightning_predicts_every_test_image_in_order(archive):
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
    data = cifar(archive)
    batches = trainer.predict(Seen(), datamodule=data)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(30))
    assert torch.equal(torch.cat([batch.images for batch in batches]), data.test_set.images / torch.tensor(255.0))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_statistics_of_the_real_data(dataset):
    if not (SHARED / "data" / "unpack.py").is_file():
        pytest.skip("the real data are not here")
    import importlib.util

    spec = importlib.util.spec_from_file_location("unpack", SHARED / "data" / "unpack.py")
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    images, labels, names = unpack.read_split(dataset, "train")
    data = CIFARDataModule(dataset)
    assert len(names) == data.num_classes and len(labels) == 50_000
    for channel in range(3):
        histogram = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean = (histogram * np.arange(256)).sum() / 255
        std = ((histogram * (np.arange(256) / 255 - mean) ** 2).sum()) ** 0.5
        assert abs(mean - data.statistics.mean[channel]) < 1e-4 and abs(std - data.statistics.std[channel]) < 2e-4
