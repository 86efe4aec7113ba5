"""Networks of torchvision and timm through everything that the project does, on JPEGs of many sizes."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torchvision import models

from kdq_lightning.cli import main
from kdq_lightning.commands.running import read_settings
from kdq_lightning.networks import build_network, strided_on_one_pixel
from kdq_lightning.runs.checkpoints import load_trained
from kdq_lightning.runs.records import Record, packed_path, read_records
from kdq_lightning.study.cost import Architecture
from tests.jpegs import PATTERNS, write_jpegs
from tests.printed import scores
from tests.studies import TINY, write_study

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "any_network.md").read_text()
MOBILE, LCNET = "torchvision/mobilenet_v3_small", "timm/lcnet_050"
CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
ONE_STEP = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
ONE_STEP += ["--data.val_size=8", "--quantization.bits=[4]", "--quantization.calibration_images=16"]
ROUNDING = ["--quantization.solver=rounding"]  # quick

QUICK = ["--data=DigitsDataModule", "--data.batch_size=32", *CPU, "--trainer.precision=32-true"]
QUICK += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2", "--quantization.enabled=false"]


def blocks(language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return [part.split("```")[0] for part in PAGE.split(f"```{language}\n")[1:]]


def commands() -> list[list[str]]:
    """Return the arguments of the page's commands."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("kdq ")]


def rows(run: str, method: str = "default") -> dict[int, Record]:
    """Return a run's rows by bit width; 32 is the float network."""
    return {row.bits: row for row in read_records(Path(f"runs/{run}/version_0")) if row.method in ("", method)}


def accuracy(printed: str) -> float:
    """Return the accuracy in the table that `kdq test` prints, in percent."""
    return scores(printed)[0]


@pytest.mark.slow(seconds=400)
@pytest.mark.timeout(1800)
def test_the_commands_of_the_page(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Typed as they stand there: the students learn from the teacher, and 4 bits keep what they know."""
    pytest.importorskip("timm")
    write_jpegs(Path("photos"), train=80, test=60)
    Path("photos.yaml").write_text(blocks("yaml")[0])
    for arguments in commands():
        assert main([*arguments, *(CPU if arguments[0] != "export" else [])]) == 0, arguments
        printed = capsys.readouterr().out
        if arguments[0] == "test":
            assert accuracy(printed) == pytest.approx(rows("lcnet")[4].test_top1, abs=1e-3)
    chance = 100 / len(PATTERNS)
    for run, network in (("teacher", "torchvision/resnet18"), ("mobilenet", MOBILE), ("lcnet", LCNET)):
        found = rows(run)
        assert found[32].test_top1 >= (chance + 100) / 2
        assert found[4].test_top1 >= found[32].test_top1 - 2
        assert found[4].network == network and packed_path(Path(f"runs/{run}/version_0"), found[4]).is_file()
        assert 8 * found[4].packed_bytes < 1.6 * found[32].packed_bytes
    assert torch.load("mobilenet.pth", weights_only=True)["classifier.3.weight"].shape == (4, 1024)
    models.mobilenet_v3_small(num_classes=4).load_state_dict(torch.load("mobilenet.pth", weights_only=True))
    with Path("runs/mobilenet/version_0/predictions.csv").open(encoding="utf-8") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 60 * len(PATTERNS)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession("lcnet.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": torch.zeros(1, 3, 96, 96).numpy()})[0].shape == (1, 4)
    told = session.get_modelmeta().custom_metadata_map
    assert told["class_names"] == ",".join(sorted(PATTERNS)) and told["dataset"] == "photos"


# A few steps of everything


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a few JPEGs, and beside it a run of two steps of a teacher, a ResNet-18 of torchvision."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    write_jpegs(root, train=8, test=4)
    teacher = ["--model=Classifier", "--model.network=torchvision/resnet18", "--model.learning_rate=0.001"]
    options = [*folder(root), *CPU, *ONE_STEP, "--quantization.enabled=false"]
    assert main(["fit", *teacher, *options, f"--trainer.default_root_dir={root.parent}", "--name=teacher"]) == 0
    return root


def folder(root: Path, size: int = 64) -> list[str]:
    return [
        "--data=ImageFolderDataModule",
        f"--data.root={root}",
        f"--data.image_size={size}",
        "--data.batch_size=8",
    ]


def hints(photos: Path, network: str, layer: str) -> list[str]:
    taught = ["--model=HintKD", f"--model.teacher={photos.parent}/teacher", "--model.teacher_hint_layer=layer2"]
    own = [f"--model.network={network}", f"--model.hint_layer={layer}", "--model.hint_share=0.5"]
    return [*taught, *own, "--model.learning_rate=0.001"]


@pytest.mark.parametrize(
    ("network", "layer"),
    [(MOBILE, "features.3"), pytest.param(LCNET, "blocks.2", marks=pytest.mark.slow(seconds=10))],
)
def test_taught_packed_tested_exported_predicted(network: str, layer: str, photos: Path, workspace: Path, capsys):
    """Through both stages of hints; the packed file alone gives the recorded accuracy."""
    if network == LCNET:
        pytest.importorskip("timm")
    options = [*hints(photos, network, layer), *folder(photos), *CPU, *ONE_STEP, *ROUNDING]
    assert main(["fit", *options, "--name=student"]) == 0
    record = rows("student", "custom")[4]
    packed = packed_path(Path("runs/student/version_0"), record)
    assert packed.name.startswith(network.replace("/", "-") + "-custom-") and packed.is_file()
    (trained,) = load_trained(packed).values()
    assert (trained.network, trained.image_shape, trained.class_names) == (
        network,
        (3, 64, 64),
        tuple(sorted(PATTERNS)),
    )
    capsys.readouterr()
    own = ["--model=Classifier", f"--model.network={network}", *folder(photos), *CPU]
    assert main(["test", *own, f"--ckpt_path={packed}"]) == 0
    assert accuracy(capsys.readouterr().out) == pytest.approx(record.test_top1, abs=1e-3)
    assert main(["predict", *own, f"--ckpt_path={packed}"]) == 0
    assert main(["export", str(packed), "--to=torch_export", "--out=student.pt2"]) == 0
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load("student.pt2").module()(images), trained.build()(images), rtol=1e-3, atol=1e-4
        )
    assert main(["export", str(packed), "--to=state_dict", "--out=student.safetensors"]) == 0
    plain = build_network(network, len(PATTERNS))
    state = load_file("student.safetensors")
    assert {key for key in plain.state_dict() if not key.endswith("num_batches_tracked")} <= state.keys()
    assert main(["report", "runs", "--out=report"]) == 0
    assert f"({network})" in Path("report/report.md").read_text()


def test_hints_that_are_refused(photos: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """A layer that isn't named or isn't there, and one whose output is no image: one sentence that helps."""
    for layer, sentence in (
        (
            None,
            "nothing says which layer of torchvision/mobilenet_v3_small hints are taken from: give --model.init_args",
        ),
        ("layer2", "has no layer 'layer2': give --model.init_args.hint_layer one of features, features.0, "),
        ("classifier", "layer classifier gives a tensor of 2 dimensions"),
    ):
        options = hints(photos, MOBILE, str(layer))
        options = [option for option in options if layer is not None or "--model.hint_layer" not in option]
        assert main(["fit", *options, *folder(photos), *CPU, *ONE_STEP]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert not list(workspace.rglob("version_*"))


def test_images_that_are_refused(photos: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Before anything is trained."""
    options = ["--model=Classifier", "--model.network=torchvision/alexnet", *folder(photos, size=32), *CPU, *ONE_STEP]
    assert main(["fit", *options]) == 1
    error = capsys.readouterr().err
    assert "torchvision/alexnet can't take images of 3 x 32 x 32" in error and error.count("\n") == 1
    assert not list(workspace.rglob("version_*"))


def test_wrong_gradients_are_refused(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Which torch computes on a CPU in bfloat16 where a convolution with a stride sees a single pixel."""
    options = ["--model=Classifier", f"--model.network={MOBILE}", *QUICK]
    for size in (16, 8):
        assert main(["fit", *options, "--trainer.precision=bf16-mixed", f"--data.image_sizes=[{size}]"]) == 1
        error = capsys.readouterr().err
        assert f"images of 3 x {size} x {size} the layer features." in error and error.count("\n") == 1
    assert strided_on_one_pixel(build_network(MOBILE, 4), torch.zeros(1, 3, 64, 64)) is None
    assert strided_on_one_pixel(build_network(MOBILE, 4), torch.zeros(1, 3, 16, 16)) == "features.9.block.1.0"


def test_an_import_path_with_arguments(photos: Path, workspace: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    """Of a module in the working folder; later commands and the teacher's flags name it again, or it is refused."""
    Path("my_nets.py").write_text("from tests.test_networks import TwoHeads as build\n")
    own = ["--model.network=my_nets.build", "--model.network_args={width: 6}", *folder(photos), *CPU, *ONE_STEP]
    own += ["--quantization.methods=[default]"]
    assert main(["fit", "--model=Classifier", *own, "--name=own"]) == 0, capsys.readouterr().err
    packed = next(Path("runs/own/version_0/packed").iterdir())
    assert packed.name.startswith("my_nets.build-")
    for weights in ("runs/own", packed):
        assert main(["test", "--model=Classifier", *own, f"--ckpt_path={weights}"]) == 0
        capsys.readouterr()
        assert main(["export", str(weights), "--to=state_dict", "--out=x.pth"]) == 1
        assert "files import no code: give --network my_nets.build" in capsys.readouterr().err
        named = ["--network=my_nets.build", "--network_args={width: 6}"]
        assert main(["export", str(weights), "--to=state_dict", "--out=x.pth", *named]) == 0
        student = ["--model=VanillaKD", f"--model.teacher={weights}", *own, "--quantization.enabled=false"]
        assert main(["fit", *student]) == 1
        assert "give --model.init_args.teacher_network my_nets.build if you know" in capsys.readouterr().err
        named = ["--model.teacher_network=my_nets.build", "--model.teacher_network_args={width: 6}"]
        assert main(["fit", *student, *named]) == 0


def test_published_weights_from_the_command_line(photos: Path, workspace: Path, monkeypatch, capsys):
    """From torch's cache; the statistics are theirs, and a resumed run doesn't need them any more."""
    monkeypatch.setenv("TORCH_HOME", str(workspace))
    torch.manual_seed(0)
    published = models.mobilenet_v3_small().state_dict()
    place = workspace / "hub/checkpoints" / models.MobileNet_V3_Small_Weights.DEFAULT.url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.save(published, place)
    options = ["--model=Classifier", f"--model.network={MOBILE}", "--model.pretrained=true", *folder(photos), *CPU]
    options += [*ONE_STEP, "--trainer.max_epochs=2", "--model.learning_rate=1e-9", "--quantization.enabled=false"]
    options += ["--data.mean=[0.1,0.2,0.3]", "--name=run"]
    assert main(["fit", *options, "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"]) == 1
    assert "starts from published weights, and takes their statistics" in " ".join(capsys.readouterr().out.split())
    place.unlink()
    assert main(["fit", *options, "--ckpt_path=last"]) == 0, capsys.readouterr().err
    (trained,) = load_trained("runs/run").values()
    assert trained.statistics == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert len(trained.state["classifier.3.weight"]) == 4
    torch.testing.assert_close(trained.state["features.0.0.weight"], published["features.0.0.weight"])
    assert main(["fit", *options]) == 1
    assert "can't be fetched" in capsys.readouterr().err


@pytest.mark.parametrize("stop", ["StopAfterFirstEpoch", "StopInTheSecondEpoch"])
def test_a_network_that_draws_goes_on(stop: str, workspace: Path):
    """Between epochs or within one, to the unbroken run's weights to the bit: MobileNetV3 has dropout."""
    options = ["fit", "--model=Classifier", f"--model.network={MOBILE}", *QUICK]
    assert main([*options, "--name=whole"]) == 0
    assert main([*options, "--name=broken", f"--trainer.callbacks+=tests.test_cli.{stop}"]) == 1
    assert main([*options, "--name=broken", "--ckpt_path=last"]) == 0
    whole, resumed = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "broken")
    )
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_goes_on_with_its_own_arguments_alone(workspace: Path, capsys: pytest.CaptureFixture[str]):
    options = ["fit", "--model=Classifier", f"--model.network={MOBILE}", *QUICK, "--name=run"]
    assert main(
        [*options, "--model.network_args={dropout: 0.5}", "--trainer.callbacks+=tests.test_cli.StopAfterFirstEpoch"]
    )
    assert main([*options, "--ckpt_path=last"]) == 1
    assert "was trained with network_args {'dropout': 0.5}, this command says None" in capsys.readouterr().err


@pytest.mark.slow(seconds=7)
def test_a_study(workspace: Path):
    """A student of torchvision's, trained, quantized and reported; `test_study_budget` plans it."""
    runs = {
        "teacher": {"config": "teacher_cpu.yaml", "overrides": {"model.init_args.network": "resnet8"}},
        "vanilla": {
            "config": "vanilla_cpu.yaml",
            "overrides": {
                "model.init_args.network": MOBILE,
                "model.init_args.network_args": {"dropout": 0.1},
                "model.init_args.teacher": "{teacher}",
            },
        },
    }
    few = {
        **TINY["overrides"],
        "trainer.precision": "32-true",
        "quantization.methods": ["default"],
        "quantization.solver": "rounding",
    }
    path = write_study(TINY | {"runs": runs, "overrides": TINY["overrides"] | few})
    assert main(["study", str(path)]) == 0
    report = Path("runs/tiny/report/report.md").read_text()
    assert f"Vanilla KD ({MOBILE})" in report and "Teacher (resnet8)" in report
    assert main(["study", str(path)]) == 0


def test_the_cost_of_a_network_with_arguments():
    data = type("Data", (), {"num_classes": 3})()
    assert Architecture(MOBILE, {"width_mult": 0.5}).build(data).classifier[3].weight.shape == (3, 512)


def test_the_config_of_the_page_is_read(workspace: Path):
    """Every command's options, without running it."""
    write_jpegs(Path("photos"), train=1, test=1)
    Path("photos.yaml").write_text(blocks("yaml")[0])
    assert yaml.safe_load(blocks("yaml")[0])["data"]["init_args"]["root"] == "photos"
    hashes = [read_settings(arguments).config_hash for arguments in commands() if arguments[0] == "fit"]
    assert len(set(hashes)) == 3
