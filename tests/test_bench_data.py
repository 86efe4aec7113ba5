"""`kdq bench data`: the pipelines load every image, and speeds are those of known times."""

import time

import pytest
import torch
from jsonargparse import ArgumentParser, Namespace

from kdq_lightning.bench import data
from kdq_lightning.bench.measure import Timing


def test_pipelines_load_every_image(monkeypatch: pytest.MonkeyPatch):
    """Once each, and normalised: in the middle, which no crop moves out, all views have the images' one colour."""
    images = torch.full((6, 3, 32, 32), 200, dtype=torch.uint8)
    views, read = [], []
    ours = data.NoiseDataModule(images, batch_size=2)
    view = ours.training_view
    monkeypatch.setattr(ours, "training_view", lambda *args, **kwargs: views.append(view(*args, **kwargs)) or views[-1])
    ours.epoch()
    pil = data._PillowImages(images)
    get = data._PillowImages.__getitem__
    monkeypatch.setattr(data._PillowImages, "__getitem__", lambda self, place: read.append(place) or get(self, place))
    pil.epoch(batch_size=4)
    assert sorted(read) == [0, 1, 2, 3, 4, 5] and [len(batch.images) for batch in views] == [2, 2, 2]
    expected = (200 / 255 - torch.tensor(data._MEAN)) / torch.tensor(data._STD)
    ours_normalized = ours.normalize(torch.cat([batch.images for batch in views]))
    for image in (*ours_normalized, *(pil[place][0] for place in range(6))):
        torch.testing.assert_close(image[:, 16, 16], expected)


def test_speeds_of_known_pipelines(monkeypatch: pytest.MonkeyPatch, capsys):
    """16 images in 80 ms with PIL, 64 in 20 ms with ours: 200 and 3,200 images/s, 16 times as many."""
    monkeypatch.setattr(data._PillowImages, "epoch", lambda self, batch_size: time.sleep(0.08))
    monkeypatch.setattr(data.NoiseDataModule, "epoch", lambda self: time.sleep(0.02))
    parser = ArgumentParser()
    data.add_arguments(parser)
    figures = data.run(parser.parse_args(["--batch_size=16", "--images=64", "--repeats=3"]))
    assert "1 used" in figures["hardware"]
    pil, ours = figures["pipelines"]["PIL: crop, flip"], figures["pipelines"]["ours: crop, flip"]
    assert pil["images_per_second"] == pytest.approx(200, rel=0.2) and pil["ratio"] == 1
    assert ours["images_per_second"] == pytest.approx(3200, rel=0.2)
    assert ours["ratio"] == pytest.approx(16, rel=0.3)
    printed = capsys.readouterr().out
    assert "ours: crop, flip, cutout" in printed and f"{ours['ratio']:.1f}" in printed


def test_speeds_count_the_images_that_were_read(monkeypatch):
    timing = Timing(median=2.0, fastest=1.0, slowest=4.0, processor=2.0)
    monkeypatch.setattr(data, "interleaved", lambda functions, repeats: dict.fromkeys(functions, timing))
    figures = data.run(Namespace(batch_size=16, images=64, repeats=1))["pipelines"]
    assert figures["PIL: crop, flip"] == {"images_per_second": 8, "slowest": 4, "fastest": 16, "ratio": 1}
    assert figures["ours: crop, flip"]["ratio"] == 4
