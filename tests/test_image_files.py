"""Images as people have them: orientation, depth, transparency, names, and folders split or not."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdq_lightning.data.datamodules import ImageFolderDataModule
from kdq_lightning.data.decoding import decode_file
from kdq_lightning.errors import UserError

GENERATOR = np.random.default_rng(0)
ARROW = np.zeros((8, 8, 3), np.uint8)
ARROW[:4, :4], ARROW[:4, 4:], ARROW[4:, :4] = (255, 0, 0), (0, 255, 0), (0, 0, 255)

# What a viewer does with the stored picture, by the tag of EXIF (TIFF 6.0, Orientation).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("tag", TURNS)
def test_orientation(tmp_path: Path, tag: int, suffix: str):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(ARROW).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    found = decode_file(str(tmp_path / f"a.{suffix}"), 8).astype(int)
    assert np.abs(found - TURNS[tag](ARROW).astype(int)).max() < 16


def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path):
    Image.fromarray(ARROW).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert decode_file(str(tmp_path / "a.jpg"), 8).shape == (8, 8, 3)


def save_as(path: Path, values: np.ndarray) -> np.ndarray:
    Image.fromarray(values).save(path)
    return decode_file(str(path), values.shape[0])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str):
    values = GENERATOR.integers(0, 65536, (16, 16)).astype(np.uint16)
    found = save_as(tmp_path / f"a.{suffix}", values)
    expected = np.round(values.astype(np.float64) / 65535 * 255)
    assert np.abs(found - expected[..., None]).max() <= (1 if suffix == "pgm" else 0) and found.std() > 50


def write_tiff(path: Path, values: np.ndarray, bits: int, white_is_zero: bool = False) -> None:
    """Write a grey TIFF byte by byte (TIFF 6.0, section 2), as Pillow writes neither 12 bits nor zero for white."""
    flat, is_float = values.flatten(), values.dtype == np.float32
    if bits == 12:  # two numbers in three bytes, the high bits first
        pairs = zip(flat[::2].tolist(), flat[1::2].tolist(), strict=True)
        data = b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)
    else:
        data = flat.astype("<f4" if is_float else "<u2").tobytes()
    height, width = values.shape
    short = {256: width, 257: height, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1, 278: height}
    long = {273: 8, 279: len(data)}
    entries = [(tag, 3, value) for tag, value in short.items()] + [(tag, 4, value) for tag, value in long.items()]
    entries.append((339, 3, 3 if is_float else 1))
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(entries))
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(entries)) + directory + bytes(4))


@pytest.mark.parametrize(("bits", "white_is_zero"), [(12, False), (16, False), (16, True), (32, False), (32, True)])
def test_a_tiff_says_what_its_numbers_mean(tmp_path: Path, bits: int, white_is_zero: bool):
    """Of 12 and 16 bits, and of floats in [0, 1]: how many bits there are, and whether 0 is black or white."""
    shares = GENERATOR.random((16, 16))
    highest = {12: 4095, 16: 65535, 32: 1}[bits]
    values = (shares * highest).astype(np.float32 if bits == 32 else np.uint16)
    write_tiff(tmp_path / "a.tif", values, bits, white_is_zero)
    bright = values / highest
    expected = 255 * (1 - bright if white_is_zero else bright)
    found = decode_file(str(tmp_path / "a.tif"), 16).astype(float)
    assert np.abs(found - expected[..., None]).max() < 0.51


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate"])
def test_zero_is_white_in_a_compressed_tiff(tmp_path: Path, compression: str):
    values = GENERATOR.integers(0, 65536, (16, 16)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
    straight = decode_file(str(tmp_path / "a.tif"), 16)
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)
    assert content.count(entry + struct.pack("<HH", 1, 0)) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(entry + b"\x01", entry + b"\x00"))
    inverted = decode_file(str(tmp_path / "a.tif"), 16)
    assert np.abs(inverted.astype(int) + straight - 255).max() <= 1 and straight.std() > 50


def test_floats_are_scaled_or_refused(tmp_path: Path):
    values = GENERATOR.random((16, 16)).astype(np.float32)
    found = save_as(tmp_path / "a.tif", values)
    assert np.array_equal(found[..., 0], np.round(values.astype(np.float64) * 255)) and found.std() > 50
    for wrong in (values * 255, values - 0.5, np.where(values > 0.5, np.nan, values).astype(np.float32)):
        with pytest.raises(UserError, match=r"a\.tif is not a readable image.*floats must lie between 0 and 1"):
            save_as(tmp_path / "a.tif", wrong)


def test_integers_without_a_range_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="32-bit integers have no known range"):
        save_as(tmp_path / "a.tif", GENERATOR.integers(0, 2**31, (16, 16)).astype(np.int32))
    write_tiff(tmp_path / "b.tif", GENERATOR.integers(0, 100, (16, 16)).astype(np.uint16), 16)
    signed = struct.pack("<HHI", 339, 3, 1)
    content = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "b.tif").write_bytes(content.replace(signed + b"\x01", signed + b"\x02"))
    with pytest.raises(UserError, match="16-bit integers have no known range"):
        decode_file(str(tmp_path / "b.tif"), 16)


def test_transparency_lies_on_white(tmp_path: Path):
    """As pixels of an alpha channel, of a grey image, of a palette's colour, and of a PNG's one colour."""
    pixels = GENERATOR.integers(0, 256, (16, 16, 4)).astype(np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(save_as(tmp_path / "rgba.png", pixels) - expected).max() < 1.1
    Image.fromarray(pixels[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert np.abs(decode_file(str(tmp_path / "la.png"), 16) - expected[..., :1]).max() < 1.1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=1)
    palette.save(tmp_path / "p.gif", transparency=1)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    for name in ("p.png", "p.gif", "rgb.png"):
        assert (decode_file(str(tmp_path / name), 8) == 255).all(), name
    palette.save(tmp_path / "opaque.png")
    assert (decode_file(str(tmp_path / "opaque.png"), 8) == (10, 20, 30)).all()


def write(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """Write so many images of each class; no two are alike."""
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(GENERATOR.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def load(root: Path, **options: object) -> ImageFolderDataModule:
    data = ImageFolderDataModule(root, image_size=16, **options)
    data.setup()
    return data


def test_names_in_any_encoding(tmp_path: Path):
    """Of files and of classes; a second reading comes from the cache, and knows the files, too."""
    root = write(tmp_path / "data", {"train": {"a": 3}, "test": {"a": 1}})
    for split in ("train", "test"):
        folder = os.fsencode(root / split) + b"/caf\xe9"
        os.mkdir(folder)
        for name in (b"\xff\xfe.png", "ü.png".encode(), "ü.png".encode("utf-16-le").strip(b"\0"), b"line\nbreak.png"):
            with open(folder + b"/" + name.replace(b"\0", b""), "wb") as file:
                Image.new("RGB", (16, 16), (len(name), 0, 0)).save(file, "PNG")
    first, second = load(root, val_size=1), load(root, val_size=1)
    assert len(first.train_set) == 7 and os.fsencode(first.class_names[1]) == b"caf\xe9"
    assert first.train_set.files == second.train_set.files
    assert torch.equal(first.train_set.images, second.train_set.images)


def test_files_belong_to_their_images(tmp_path: Path):
    root = write(tmp_path / "data", {"train": {"a": 5, "b": 4}, "test": {"a": 2, "b": 2}})
    for data in (load(root), load(root)):  # decoded, then from the cache
        for images in (data.train_set, data.test_set):
            for name, image in zip(images.files, images.images, strict=True):
                assert torch.equal(torch.tensor(decode_file(str(root / name), 16)).permute(2, 0, 1), image)


@pytest.mark.parametrize("name", ["Thumbs.db", "THUMBS.DB", "desktop.ini", ".DS_Store", "._1.png", "Icon\r", "@eaDir"])
def test_files_that_are_no_images_by_name(tmp_path: Path, name: str):
    root = write(tmp_path / "data", {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    (root / "train/b" / name).write_bytes(b"no image")
    (root / "train/.hidden").mkdir()
    (root / "train/@eaDir").mkdir()
    for data in (load(root), load(root)):
        assert len(data.train_set) == 6 and data.class_names == ["a", "b"]
        assert [note for note in data.notes if note.startswith(f"1 files in {root / 'train'} skipped")]


def test_a_class_without_a_training_image_is_said(tmp_path: Path):
    root = write(tmp_path / "data", {"train": {"few": 1, "many": 9}, "test": {"few": 1, "many": 1}})
    said = [note for note in load(root, val_size=9).notes if "class few are kept for validation" in note]
    assert len(said) == 1 and load(root, val_size=1).notes == []


def test_a_folder_of_validation_images(tmp_path: Path):
    """They are the validation images, all of them and no others, whatever `val_size` says."""
    root = write(tmp_path / "data", {"train": {"a": 5, "b": 4}, "val": {"a": 3}, "test": {"a": 2, "b": 2}})
    data = load(root, val_size=0.5)
    found = {data.train_set.files[i] for i in data.val_index.tolist()}
    assert found == {f"val/a/{i}.png" for i in range(3)} and len(data.train_set) == 12
    assert all(data.train_set.files[i].startswith("train/") for i in data.train_index.tolist())
    assert len(data.train_index) == 9 and data.train_set.labels.tolist() == [0] * 8 + [1] * 4
    for name, image in zip(data.train_set.files, data.train_set.images, strict=True):
        assert torch.equal(torch.tensor(decode_file(str(root / name), 16)).permute(2, 0, 1), image)
    (root / "val/c").mkdir()
    with pytest.raises(UserError, match="val/c is not a class of the training images"):
        load(root)


def test_one_folder_of_classes_is_split(tmp_path: Path):
    """A stratified fifth is the test set, the same for every seed of a run and another for every split seed."""
    root = write(tmp_path / "pets", {".": {"cats": 10, "dogs": 20}})
    data, again, other = load(root, seed=1), load(root, seed=2), load(root, split_seed=1)
    assert data.test_set.labels.bincount().tolist() == [2, 4] and len(data.train_set) == 24
    assert data.dataset == "pets" and data.class_names == ["cats", "dogs"]
    assert not set(data.test_set.files) & set(data.train_set.files)
    assert again.test_set.files == data.test_set.files != other.test_set.files
    assert any("6 of its images are the test set" in note for note in data.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets"], "the cache lies in the folder"
