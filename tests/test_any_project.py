"""The callback in a Lightning project that knows nothing of ours: its own module, loaders, loggers and trainer."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from kdq_lightning import PostTrainingQuantization, load_packed, quantize
from kdq_lightning.errors import UserError
from kdq_lightning.quantization.packing import read_weights
from tests.processes import run_in_fork

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
BITS = (2, 4)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise with a brighter quadrant, whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        pixel[:, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 0.6
    return pixels, labels


class Noisy(Dataset):
    """Images that are augmented when they are read, with the global generator."""

    def __init__(self, count: int, seed: int, noise: float = 0.0):
        self.pixels, self.labels = images(count, seed)
        self.noise = noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = self.pixels[index]
        return pixels + self.noise * torch.randn(pixels.shape), self.labels[index]


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))


class Project(LightningModule):
    """A classifier like any other."""

    def __init__(self, learning_rate: float = 0.05):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = build()
        self.criterion = nn.CrossEntropyLoss()  # a child without parameters

    def training_step(self, batch, batch_idx):
        pixels, labels = batch
        return self.criterion(self.net(pixels), labels)

    def validation_step(self, batch, batch_idx):
        pixels, labels = batch
        self.log("accuracy", (self.net(pixels).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)


class BreaksAfterwards(Project):
    """Is best after its first epoch."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net[3].weight.data *= -10


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Noisy(96, 1, 0.1), 16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Noisy(50, 2), 16)

    def test_dataloader(self):
        return DataLoader(Noisy(70, 3), 16)


def trainer(*callbacks, **options) -> Trainer:
    plain = {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(callbacks=list(callbacks), **plain | options)


def callback(**options) -> PostTrainingQuantization:
    return PostTrainingQuantization(**{"bits": BITS, "calibration_images": 32, **options})


def loaders(noise: float = 0.0) -> tuple[DataLoader, DataLoader]:
    return DataLoader(Noisy(96, 1, noise), 16, shuffle=True), DataLoader(Noisy(50, 2), 16)


def rows(folder: Path | str) -> list[dict[str, str]]:
    """Return the table without the one column that no two executions share."""
    with (Path(folder) / "quantized.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def accuracy(network: nn.Module, count: int, seed: int) -> float:
    pixels, labels = images(count, seed)
    with torch.no_grad():
        return 100 * (network.eval()(pixels).argmax(1) == labels).float().mean().item()


WANTED = [("default", "2"), ("default", "4"), ("gpfq", "2"), ("gpfq", "4"), ("", "32")]


def test_loaders_and_a_csv_logger(workspace: Path):
    """Rows, files and logged numbers are those of the best checkpoint, computed here by hand."""
    module, logger = BreaksAfterwards(), CSVLogger("logs", "mine")
    best = ModelCheckpoint(monitor="accuracy", mode="max")
    fitted = trainer(callback(), best, logger=logger)
    fitted.fit(module, *loaders())
    assert "epoch=0" in best.best_model_path
    folder = workspace / "logs/mine/version_0"
    table = rows(folder)
    assert [(row["method"], row["bits"]) for row in table] == WANTED
    state = torch.load(best.best_model_path)["state_dict"]
    network = build()
    network.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    assert float(table[-1]["val_top1"]) == pytest.approx(accuracy(network, 50, 2))
    assert accuracy(network, 50, 2) > 40
    assert {row["test_top1"] for row in table} == {""}
    files = {f"net-{rest}.safetensors" for rest in ("midrise-2bit", "int-4bit", "gpfq-paper-2bit", "gpfq-paper-4bit")}
    assert {path.name for path in (folder / "packed").iterdir()} == files
    for row in table[:-1]:
        (path,) = (folder / "packed").glob(
            f"net-{'gpfq-' * (row['method'] == 'gpfq')}{row['codebook']}-{row['bits']}bit*"
        )
        assert int(row["packed_bytes"]) == path.stat().st_size
        assert float(row["val_top1"]) == pytest.approx(accuracy(load_packed(path, build()), 50, 2))
    assert (table[0]["run"], table[0]["strategy"], table[0]["dataset"]) == ("mine", "BreaksAfterwards", "Noisy")
    with (folder / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    for tag, wanted in (("accuracy_vs_bits", table[:2]), ("accuracy_vs_bits_gpfq", table[2:4])):
        points = [(row["step"], float(row[f"quantized/{tag}"])) for row in logged if row[f"quantized/{tag}"]]
        assert points == [(row["bits"], pytest.approx(float(row["val_top1"]))) for row in wanted]
    assert accuracy(module.net, 50, 2) < 40  # the module itself stays as the last epoch left it


def test_a_datamodule_without_a_logger(workspace: Path):
    """Into the default root; of both splits, limits counted and marked."""
    fitted = trainer(
        callback(), logger=False, default_root_dir="here", limit_test_batches=2, enable_checkpointing=False
    )
    module = Project()
    fitted.fit(module, datamodule=Data())
    table = rows("here")
    assert [(row["method"], row["bits"]) for row in table] == WANTED and table[0]["run"] == "here"
    assert {row["partial"] for row in table} == {"True"} and {row["dataset"] for row in table} == {"Data"}
    assert float(table[-1]["val_top1"]) == pytest.approx(accuracy(module.net, 50, 2))
    pixels, labels = images(70, 3)
    with torch.no_grad():
        hits = (module.net(pixels[:32]).argmax(1) == labels[:32]).float().mean().item()
    assert float(table[-1]["test_top1"]) == pytest.approx(100 * hits)
    assert not (workspace / "here" / "finished").exists()


class Notes(Logger):
    """A logger of someone else, with no folder of its own."""

    name, version = "notes", "first"

    def __init__(self):
        super().__init__()
        self.points = []

    @property
    def save_dir(self):
        return "elsewhere"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.points += [(tag, step, value) for tag, value in metrics.items()]


@pytest.mark.pictures
def test_any_loggers(workspace: Path):
    """Each gets every point once; TensorBoard figures and table, too."""
    notes, board = Notes(), TensorBoardLogger("board", "mine")
    trainer(callback(), logger=[notes, board]).fit(Project(), *loaders())
    table = rows("elsewhere/notes/first")
    points = {(tag, step): value for tag, step, value in notes.points if tag.startswith("quantized")}
    assert len(points) == sum(tag.startswith("quantized") for tag, _, _ in notes.points)
    assert points["quantized/accuracy_vs_bits_gpfq", 4] == pytest.approx(float(table[3]["val_top1"]))
    assert points["quantized/accuracy_vs_bytes", int(table[0]["packed_bytes"])] == float(table[0]["val_top1"])
    events = EventAccumulator("board/mine/version_0").Reload()
    written = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        if tag.startswith("quantized")
        for event in events.Scalars(tag)
    }
    assert written == pytest.approx(points)
    assert "quantized/figure" in events.Tags()["images"]
    assert "quantized/table/text_summary" in events.Tags()["tensors"]


class TwoNetworks(Project):
    """Has a second child, and says which is which only if asked by name."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(4, 2)


class Names(TwoNetworks):
    def networks(self):
        return {"first": self.net, "second": nn.Sequential(self.net, nn.Linear(4, 4))}


def test_which_network(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Its only child, the one that is named, or what its own method names; else a sentence before any step."""
    steps = []
    monkeypatch.setattr(Project, "on_train_batch_start", lambda *args: steps.append(args))
    with pytest.raises(Exception, match=r"TwoNetworks has several children with parameters \(net, probe\): give"):
        trainer(callback(), logger=False).fit(TwoNetworks(), *loaders())
    with pytest.raises(Exception, match="has no submodule 'head'"):
        trainer(callback(network="head"), logger=False).fit(TwoNetworks(), *loaders())
    assert not steps
    options = {"logger": False, "max_epochs": 1}
    trainer(callback(network="net"), default_root_dir="named", **options).fit(TwoNetworks(), *loaders())
    assert {row["network"] for row in rows("named")} == {"net"}
    trainer(callback(), default_root_dir="own", enable_checkpointing=False, **options).fit(Names(), *loaders())
    assert {(row["network"], row["peer"]) for row in rows("own")} == {("Sequential", "first"), ("Sequential", "second")}


@pytest.mark.parametrize("options", [{"max_epochs": 0}, {"limit_train_batches": 0}])
def test_without_training_there_is_nothing_to_quantize(options: dict[str, int], workspace: Path):
    trainer(callback(), logger=False, **options).fit(Project(), *loaders())
    assert not list(workspace.rglob("quantized.csv"))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Noisy(64, 1))


def test_training_goes_as_it_would_without_the_callback(workspace: Path):
    """The same order and augmentation, and the module as its last step left it."""
    states = []
    for callbacks in ([], [callback()]):
        module = Project()
        trainer(*callbacks, logger=False, enable_checkpointing=False).fit(module, *loaders(noise=0.3))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Pairs(Noisy):
    def __getitem__(self, index):
        return {"pixels": self.pixels[index]}


class Outputs(Project):
    """Its network gives a map, whose mean its steps take."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(1, 4, 3)

    def training_step(self, batch, batch_idx):
        raise AssertionError("a step is made")

    def validation_step(self, batch, batch_idx):
        pass


def test_batches_and_outputs_are_tried_before_training(workspace: Path):
    pairs, (train, val) = DataLoader(Pairs(96, 1), 16), loaders()
    for loaders_given, sentence in (
        ((pairs, val), "the training loader gives a dict where"),
        ((train, pairs), r"a batch is not \(inputs, labels\)"),
        ((train, val), r"net returns \(16, 4, 6, 6\) for 16 images, not \(images, classes\): give"),
    ):
        with pytest.raises(Exception, match=sentence):
            trainer(callback(), logger=False).fit(Outputs(), *loaders_given)


def test_fewer_images_than_are_asked_for(workspace: Path):
    """All of them are calibrated on, and one sentence says so."""
    with pytest.warns(UserWarning, match="all 96 training images are calibrated on: 512 are asked for") as said:
        trainer(callback(calibration_images=512), logger=False, default_root_dir="few").fit(Project(), *loaders())
    assert sum("calibrated on" in str(warning.message) for warning in said) == 1
    trainer(callback(calibration_images=96), logger=False, default_root_dir="all").fit(Project(), *loaders())
    few, whole = ([{**row, "run": "", "config_hash": ""} for row in rows(folder)] for folder in ("few", "all"))
    assert few == whole


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        (DataLoader(Stream(), 16), {}, "single images of the training loader"),
        (loaders()[0], {"calibration_images": 0}, "calibration_images must be"),
        (loaders()[0], {"bits": ()}, "one or more different bit widths"),
    ],
)
def test_refused_before_training(train: DataLoader, options, sentence: str, workspace: Path):
    with pytest.raises(Exception, match=sentence):
        trainer(callback(**options), logger=False).fit(Project(), train, loaders()[1])
    assert not list(workspace.rglob("*.csv")) and not list(workspace.rglob("*.ckpt"))


def test_an_evaluation_of_the_project(workspace: Path):
    """Its numbers become columns; `top1` is the accuracy."""

    def evaluate(network, loader):
        assert not network.training and not torch.is_grad_enabled()
        logits, labels = (torch.cat(part) for part in zip(*[(network(x), y) for x, y in loader], strict=True))
        return {"top1": 100 * (logits.argmax(1) == labels).float().mean(), "margin": logits.max(1).values.mean()}

    module, notes = Project(), Notes()
    fitted = trainer(callback(evaluate=evaluate), logger=notes, enable_checkpointing=False)
    fitted.fit(module, *loaders())
    table = rows("elsewhere/notes/first")
    assert float(table[-1]["val_top1"]) == pytest.approx(accuracy(module.net, 50, 2))
    with torch.no_grad():
        margin = module.net(images(50, 2)[0]).max(1).values.mean().item()
    assert float(table[-1]["val_margin"]) == pytest.approx(margin, rel=1e-4) and table[0]["nll"] == ""
    logged = {(tag, step): value for tag, step, value in notes.points}
    assert logged["quantized/val_margin_vs_bits_gpfq", 4] == pytest.approx(float(table[3]["val_margin"]))


def fixed(folder: str, seed: int, devices: int = 1) -> list[dict[str, str]]:
    """Quantize the same weights, as training doesn't change them, after another order and other noise."""
    torch.manual_seed(seed)
    fitted = trainer(
        callback(), logger=False, default_root_dir=folder, max_epochs=1, devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
    )  # fmt: skip
    train, val = loaders(noise=0.3)
    fitted.fit(Project(learning_rate=0.0), train, val)
    return rows(folder)


def test_neither_order_nor_processes_matter(workspace: Path):
    """Two ranks, or another seed: the same images calibrate, and each image is evaluated once."""
    two, one, other = fixed("two", 1, devices=2), fixed("one", 1), fixed("other", 2)
    assert {row["run"] for row in (*two, *one, *other)} == {"two", "one", "other"}
    for row in (*two, *one, *other):
        row["run"] = ""
    assert two == one == other
    vectors = [Path(folder, "correct.safetensors").read_bytes() for folder in ("two", "one", "other")]
    assert vectors[0] == vectors[1] == vectors[2]


def test_the_engine_is_the_one_of_the_package(workspace: Path):
    """`quantize` and `load_packed`; nothing else is exported. `test_imports` has that they come without Lightning."""
    result = quantize(build(), [images(64, 1)[0]], bits=(3,))[3]
    result.save("net.safetensors")
    loaded = load_packed("net.safetensors", build())
    assert all(map(torch.equal, loaded.state_dict().values(), result.model.state_dict().values()))
    with pytest.raises(ImportError):
        from kdq_lightning import everything  # noqa: F401


def fit_from_last_checkpoint(dies_in_call: int = -1, folder: str = "root", **options) -> None:
    """Fit and quantize in a folder, from its last checkpoint if there is one; note each evaluation in `calls`."""

    def evaluate(network, loader):
        with Path("calls").open("a") as file:
            file.write("x")
        if len(Path("calls").read_text()) == dies_in_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"top1": 50.0}

    last = max(Path(folder, "checkpoints").glob("*.ckpt"), default=None)
    fitted = trainer(callback(evaluate=evaluate, **options), logger=False, default_root_dir=folder)
    fitted.fit(Project(), *loaders(), ckpt_path=last and str(last))


def test_kill_minus_9_between_two_methods(workspace: Path):
    """Gone on with from its last checkpoint, when nothing is left to train: only the other method is done."""
    # In the fourth, float, 2 and 4 bits are done.
    assert run_in_fork(lambda: fit_from_last_checkpoint(dies_in_call=4)) == -signal.SIGKILL
    before = rows("root")
    assert [(row["method"], row["bits"]) for row in before] == [*WANTED[:2], WANTED[-1]]
    files = {path: path.stat().st_mtime_ns for path in Path("root/packed").iterdir()}
    Path("calls").write_text("")
    fit_from_last_checkpoint()
    assert Path("calls").read_text() == "xxx"  # the float network, and gpfq twice
    after = rows("root")
    assert [(row["method"], row["bits"]) for row in after] == WANTED
    assert [row for row in after if row["method"] != "gpfq"] == before
    assert all(path.stat().st_mtime_ns == time for path, time in files.items() if "gpfq" not in path.name)


def test_kill_minus_9_between_two_budgets(workspace: Path):
    """Only the other budget is done, and both files are the unbroken run's."""
    two = {"bits": (4,), "methods": ("default",), "budgets": ("2kB", "2.5kB")}
    # In the fourth, float, 4 bits and the smaller budget are done.
    assert run_in_fork(lambda: fit_from_last_checkpoint(4, **two)) == -signal.SIGKILL
    assert [row["budget"] for row in rows("root") if row["method"] == "mixed"] == ["2000"]
    times = {path: path.stat().st_mtime_ns for path in Path("root/packed").iterdir()}
    Path("calls").write_text("")
    fit_from_last_checkpoint(**two)
    assert Path("calls").read_text() == "xx"  # the float network, and the other budget
    assert [row["budget"] for row in rows("root") if row["method"] == "mixed"] == ["2000", "2500"]
    assert len(times) == 2 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    fit_from_last_checkpoint(folder="whole", **two)
    for size in (2000, 2500):
        mine, theirs = (read_weights(Path(root, f"packed/net-mixed-{size}B.safetensors")) for root in ("root", "whole"))
        assert all((mine[key].codes == theirs[key].codes).all() for key in theirs)


def test_a_budget_that_no_choice_of_bits_fits(workspace: Path):
    """Is refused before the first step."""
    project = Project()
    with pytest.raises(UserError, match="a budget of 500 bytes is too small"):
        trainer(callback(bits=(4,), budgets=(500,)), logger=False).fit(project, *loaders())
    assert project.trainer.global_step == 0


def test_budgets(workspace: Path):
    """Files of mixed bits, which say of themselves what a foreign project knows, fit too."""
    trainer(callback(bits=(4,), methods=("default",), budgets=("2kB",)), logger=False).fit(Project(), *loaders())
    (mixed,) = [row for row in rows(".") if row["method"] == "mixed"]
    assert mixed["budget"] == "2000"
    size = Path("packed", "net-mixed-2000B.safetensors").stat().st_size
    assert 1_700 < size <= 2_000 and size == int(mixed["packed_bytes"])
