"""`--budget_minutes` and `kdq bench project`: what runs cost, what suits a CPU, and the epochs that fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdq_lightning.bench.step import trainer_seconds
from kdq_lightning.cli import main
from kdq_lightning.commands.arguments import load_class
from kdq_lightning.commands.running import read_settings
from kdq_lightning.data.base import ImageDataModule
from kdq_lightning.data.datamodules import CIFARDataModule, DigitsDataModule
from kdq_lightning.modules.classifier import Classifier
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import build_network
from kdq_lightning.study import budget, cost
from kdq_lightning.study.plan import read_study
from kdq_lightning.study.run import Run
from tests.conftest import CONFIGS
from tests.studies import DIGITS, TINY, write_study

BUDGET = {
    "seeds": [0, 1],
    "overrides": {**DIGITS, "data.init_args.batch_size": 512, "trainer.max_epochs": 300},
    "runs": {
        "teacher": TINY["runs"]["teacher"],
        "vanilla": {
            "config": "vanilla_cpu.yaml",
            "overrides": {**TINY["runs"]["vanilla"]["overrides"], "data.init_args.image_sizes": [8, 16]},
        },
        "dml": {
            "config": "dml_cpu.yaml",
            "seeds": [1],
            "overrides": {"model.init_args.networks": ["resnet8", "resnet8"]},
        },
    },
}
"""Without image sizes for the teacher and the peers, which the plan gives them, and with vanilla's own."""


class StrategyOfAUser(VanillaKD):
    """Registered nowhere: a config names it by its class path."""

    def __init__(self, views: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.views = views


@pytest.fixture
def known_seconds(monkeypatch: pytest.MonkeyPatch) -> list[Classifier]:
    """Put known seconds in place of what is measured, and return the modules whose steps are asked for.

    A batch takes 2 s for each trained network and for a teacher that is asked, times the image's side / 16; a forward
    1 ms; a walk 3 s, however many bit widths take part; each of the two methods walks.
    """
    timed = []

    def seconds(module: Classifier, data: ImageDataModule, batches: int, **_: object) -> float:
        timed.append(module)
        asked = getattr(module, "teacher", None) is not None and module._cache is None
        return batches * 2 * (len(module.networks()) + asked) * data.image_sizes[0] / 16

    monkeypatch.setattr(cost, "trainer_seconds", seconds)
    monkeypatch.setattr(cost.CostMeter, "forward_seconds", lambda *_: 0.001)
    monkeypatch.setattr(cost.CostMeter, "quantization_seconds", lambda *_: 3.0)
    return timed


def digits() -> DigitsDataModule:
    data = DigitsDataModule(batch_size=128)
    data.setup()
    return data


def test_a_budget_is_planned_and_kept(workspace: Path, known_seconds: list[Classifier], capsys):
    path = write_study(BUDGET, "long")
    assert main(["study", str(path), "--budget_minutes=600", "--dry_run"]) == 0
    plan = yaml.safe_load(Path("runs/long/plan.yaml").read_text())
    data = digits()
    batches, evaluated = len(data.train_index) // 128, len(data.val_index) + len(data.test_set)
    # Sides of 8, 8, 12 and 16 pixels cost 11/16 of whole images, vanilla's own of 8 and 16 pixels 3/4.
    seconds_an_epoch = {"teacher": 2 * 11 / 16 * batches, "vanilla": 4 * 0.75 * batches, "dml": 4 * 11 / 16 * batches}
    validation, networks = len(data.val_index) * 0.001, {"teacher": 1, "vanilla": 1, "dml": 2}
    total = 0.0
    for name, entry in plan["runs"].items():
        epochs = entry["options"].pop("trainer.max_epochs")
        sizes = {} if name == "vanilla" else {"data.init_args.image_sizes": [8, 8, 12, 16]}
        assert entry["options"] == {
            "data.init_args.batch_size": 128,
            "trainer.accumulate_grad_batches": 4,
            "model.init_args.optimizer": "muon",
            "model.init_args.learning_rate": 0.1,
            **sizes,
        }  # and no flip, which would make other digits
        after = networks[name] * (3 * evaluated * 0.001 + 6)
        after += evaluated * 0.001 if name == "vanilla" else 0  # its teacher's answers
        minutes = (epochs * (seconds_an_epoch[name] + networks[name] * validation) + after) / 60
        assert entry["minutes"] == pytest.approx(minutes, abs=0.06), name
        total += minutes * (1 if name == "dml" else 2)
    measured = {(module.optimizer, module.hparams.learning_rate) for module in known_seconds}
    assert measured == {("muon", 0.1)} and {module.learning_rate for module in known_seconds} == {cost.LEARNING_RATE}
    assert plan["projected_minutes"] == pytest.approx(total, abs=0.06)
    assert 0.9 * 570 < total <= 570  # an epoch more of each would be too many
    printed, told = capsys.readouterr()
    lines = told.splitlines()
    assert lines[0] == "[1/5] teacher, seed 0: measuring training batches of 128 images of 8 x 8", told
    assert re.fullmatch(r"\[5/5\] dml, seed 1: \d+\.\d s an epoch, \d+ s after training", lines[-1]), told
    ends = [line for line in lines if "measuring" not in line]
    assert len(ends) == 5 and len(lines) == len(set(lines)) > 5 and "\x1b" not in told
    assert f"--trainer.max_epochs={epochs} " in printed and f"projected: {total:.1f} of 600 minutes" in printed


def test_a_plan_stays_until_it_is_deleted(workspace: Path, known_seconds: list[Classifier], capsys):
    path, plan = write_study(BUDGET, "long"), Path("runs/long/plan.yaml")
    assert main(["study", str(path), "--budget_minutes=600", "--dry_run"]) == 0
    written = plan.read_bytes()
    capsys.readouterr()
    assert main(["study", str(path), "--budget_minutes=60", "--dry_run"]) == 0
    assert "as planned in runs/long/plan.yaml" in capsys.readouterr().err and plan.read_bytes() == written
    plan.unlink()
    assert main(["study", str(path), "--budget_minutes=1"]) == 1
    assert "1 minutes are too few" in capsys.readouterr().err and not plan.exists()
    plan.write_text("nonsense")
    assert main(["study", str(path), "--dry_run"]) == 1
    assert "plan.yaml is not a plan" in capsys.readouterr().err


def test_a_budget_of_one_seed(workspace: Path, known_seconds: list[Classifier], capsys):
    """All runs are planned; those of the seed fit, dml not among them, which has seed 1 alone."""
    path = write_study(BUDGET, "long")
    assert main(["study", str(path), "--budget_minutes=200", "--seeds=[0]", "--dry_run"]) == 0
    plan = yaml.safe_load(Path("runs/long/plan.yaml").read_text())
    minutes = {name: entry["minutes"] for name, entry in plan["runs"].items()}
    assert minutes.keys() == BUDGET["runs"].keys()
    assert plan["projected_minutes"] == pytest.approx(
        minutes["teacher"] + minutes["vanilla"], abs=0.16
    )  # three rounded numbers
    assert 0.9 * 190 < plan["projected_minutes"] <= 190
    assert re.findall(r"(\w+, seed \d): \d+ epochs", capsys.readouterr().out) == ["teacher, seed 0", "vanilla, seed 0"]


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (
            "teacher_cifar10",
            [],
            {
                "data.init_args.batch_size": 128,
                "data.init_args.flip": "alternate",
                "trainer.accumulate_grad_batches": 4,
                "model.init_args.optimizer": "muon",
                "model.init_args.learning_rate": 0.1,
                "data.init_args.image_sizes": [16, 16, 24, 32],
            },
        ),
        (
            "control_cifar10",
            ["--data.flip=false", "--data.image_sizes=[32]", "--trainer.accumulate_grad_batches=2"],
            {
                "data.init_args.batch_size": 128,
                "trainer.accumulate_grad_batches": 8,
                "model.init_args.optimizer": "muon",
                "model.init_args.learning_rate": 0.1,
            },
        ),
        (
            "recover_cifar10",
            [],
            {
                "data.init_args.batch_size": 128,
                "data.init_args.flip": "alternate",
                "model.init_args.learning_rate": 0.0005,
            },
        ),
        ("teacher_cpu", [], {"data.init_args.image_sizes": [16, 24, 32]}),
        ("recover_cpu", [], {}),
    ],
    ids=["the published study's recipe", "own sizes and no flip", "recover", "a small batch", "recover, a small batch"],
)
def test_what_suits_a_cpu(config: str, changes: list[str], expected: dict[str, Any], images: Path):
    settings = read_settings(["fit", f"--config={CONFIGS / config}.yaml", f"--data.root={images}", *changes]).config
    data = CIFARDataModule(**settings["data"]["init_args"] | {"val_size": 0})
    data.train_index = torch.arange(45000)
    assert budget.choose_cpu_options(settings, data) == expected


def test_all_bit_widths_of_a_method_are_measured_in_one_walk(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    walks = []
    monkeypatch.setattr(cost, "quantize", lambda network, batches, bits, **options: walks.append((bits, options)))
    runs = {"teacher": TINY["runs"]["teacher"]}
    bits = {**TINY["overrides"], "quantization.bits": [2, 3, 8]}
    meter = cost.CostMeter(read_study(write_study({**TINY, "overrides": bits, "runs": runs}), Path("runs")))
    meter.measure(meter.runs[0])
    assert walks == [((2, 3, 8), {}), ((2, 3, 8), {"mode": "official"})]


def test_what_recovering_costs(workspace: Path, known_seconds: list[Classifier]):
    """No quantization, one evaluation of its own and one of the teacher; hints ask the teacher whatever is kept."""
    cached = {**TINY["runs"]["vanilla"]["overrides"], "model.init_args.teacher_cache": "answers"}
    recover = {"config": "recover_cpu.yaml", "overrides": {**cached, "model.init_args.packed": "{vanilla}"}}
    runs = {**TINY["runs"], "hint": {"config": "hint_cpu.yaml", "overrides": cached}, "recover_2bit": recover}
    runs["vanilla"] = {"config": "vanilla_cpu.yaml", "overrides": cached}
    runs["dkd"] = {"config": "dkd_cpu.yaml", "overrides": cached}
    meter = cost.CostMeter(read_study(write_study({**TINY, "runs": runs}), Path("runs")))
    costs = {run.name: meter.measure(run) for run in meter.runs}
    data = meter.data(meter.runs[0])
    evaluated = 0.001 * (len(data.val_index) + len(data.test_set))
    assert costs["recover_2bit"].after == pytest.approx(2 * evaluated)
    assert costs["hint"].after == pytest.approx(4 * evaluated + 6)
    assert costs["teacher"].after == pytest.approx(3 * evaluated + 6)
    steps = {name: (cost.epoch - 0.001 * len(data.val_index)) / 2 for name, cost in costs.items()}
    assert steps == pytest.approx({"teacher": 2, "vanilla": 4, "hint": 4, "recover_2bit": 2, "dkd": 2})


def test_a_strategy_of_a_user_is_measured(workspace: Path, known_seconds: list[Classifier]):
    """With its own options, as long as vanilla here: it has the same networks."""
    own = {"model": f"{__name__}.StrategyOfAUser", "model.init_args.views": 3, **TINY["runs"]["vanilla"]["overrides"]}
    runs = {**TINY["runs"], "own": {"config": "control_cpu.yaml", "overrides": own}}
    path = write_study({**TINY, "runs": runs})
    assert main(["study", str(path), "--budget_minutes=100", "--dry_run"]) == 0
    *_, last = known_seconds
    assert type(last) is StrategyOfAUser and last.views == 3 and last.teacher is not None
    plan = yaml.safe_load(Path("runs/tiny/plan.yaml").read_text())["runs"]
    assert plan["own"]["minutes"] == plan["vanilla"]["minutes"] > 0


def test_a_network_of_torchvision_is_planned(workspace: Path, known_seconds: list[Classifier], capsys):
    """With its arguments, as a student and as a teacher of others."""
    own = {
        "model.init_args.network": "torchvision/mobilenet_v3_small",
        "model.init_args.network_args": {"dropout": 0.1},
    }
    teacher = {"config": "teacher_cpu.yaml", "overrides": own}
    vanilla = {"config": "vanilla_cpu.yaml", "overrides": {**own, "model.init_args.teacher": "{teacher}"}}
    path = write_study(TINY | {"runs": {"teacher": teacher, "vanilla": vanilla}})
    assert main(["study", str(path), "--budget_minutes=60", "--dry_run"]) == 0
    assert capsys.readouterr().out.count("--model.init_args.network=torchvision/mobilenet_v3_small") == 2
    *_, student = known_seconds
    (network,) = student.networks().values()
    assert network.classifier[2].p == student.teacher.network.classifier[2].p == 0.1


@pytest.mark.parametrize("strategy", ["teacher", "vanilla", "dkd", "mixup", "hint", "dml", "recover"])
@pytest.mark.parametrize("is_cached", [False, True])
def test_every_strategy_can_be_timed(strategy: str, is_cached: bool, workspace: Path):
    """Three batches after two, with Muon where kernels are trained; where its logits are read, no teacher is asked."""
    model = read_settings(["fit", f"--config={CONFIGS / strategy}_cpu.yaml"]).config["model"]
    options = {**model["init_args"], "num_classes": 10, "weights": "none"}
    options |= {"networks": ["resnet8", "resnet8"]} if strategy == "dml" else {"network": "resnet8"}
    options |= {} if strategy == "recover" else {"optimizer": "muon"}
    options |= {"teacher_cache": "answers"} if strategy in ("vanilla", "dkd", "hint", "recover") else {}
    data = DigitsDataModule(batch_size=8, image_sizes=[8])
    data.setup()
    teacher, asked = Teacher(build_network("resnet8", 10), data.statistics, "resnet8"), []
    teacher.network.register_forward_hook(lambda *_: asked.append(1))
    module = load_class(model["class_path"]).for_timing(options, teacher, is_cached)
    assert trainer_seconds(module, data, 3, accelerator="cpu") > 0
    calls = {"teacher": 0, "dml": 0, "mixup": 5, "hint": 4}.get(strategy, 0 if is_cached else 5)
    assert len(asked) == calls  # one of the five steps of hints is stage 1, which runs half of the teacher
    assert not Path("answers").exists()


def test_runs_at_once_wait_for_their_teachers():
    def planned(name: str, minutes: float, *needs: str) -> budget.PlannedRun:
        run = Run(name, 0, "fit", (), Path("runs"), needs)
        return budget.PlannedRun(run, cost.RunCost(60.0, 0.0), {}, max_epochs=int(minutes), min_epochs=1)

    plan = [planned("teacher", 10), planned("a", 4, "teacher"), planned("b", 3, "a"), planned("c", 1)]
    assert [budget.total_minutes(plan, 1.0, at_once) for at_once in (1, 2, 8)] == [18, 17, 17]


def test_a_budget_is_measured(workspace: Path):
    """More epochs than fit into any hundred minutes: those planned take nearly all of them by what was measured."""
    long = {"trainer.max_epochs": 10**5, "trainer.limit_train_batches": 2, "data.init_args.batch_size": 64}
    plan = write_study({**TINY, "overrides": {**TINY["overrides"], **long}})
    assert main(["study", str(plan), "--budget_minutes=100", "--dry_run"]) == 0
    planned = yaml.safe_load(Path("runs/tiny/plan.yaml").read_text())
    epochs = {entry["options"]["trainer.max_epochs"] for entry in planned["runs"].values()}
    assert len(epochs) == 1 and 1000 < epochs.pop() < 10**5
    assert 80 < planned["projected_minutes"] <= 95


def test_a_budget_is_held(workspace: Path, known_seconds: list[Classifier]):
    """A tiny study through `--budget_minutes`: the runs have the planned epochs."""
    small = {"trainer.max_epochs": 4, "trainer.limit_train_batches": 2, "data.init_args.batch_size": 64}
    plan = write_study({**TINY, "overrides": {**TINY["overrides"], **small}})
    assert main(["study", str(plan), "--budget_minutes=100"]) == 0
    planned = yaml.safe_load(Path("runs/tiny/plan.yaml").read_text())["runs"]
    assert {entry["options"]["trainer.max_epochs"] for entry in planned.values()} == {4}  # never more than the config's
    checkpoint = torch.load("runs/tiny/seed3/vanilla/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 3 and Path("runs/tiny/report/report.md").is_file()


def test_answers_that_are_kept_cost_nothing(workspace: Path):
    """Of two runs of a seed that share a teacher's answers the first one pays, unless both run at once."""
    runs = dict(BUDGET["runs"])
    cached = {**runs["vanilla"]["overrides"], "model.init_args.teacher_cache": "answers"}
    runs = {"teacher": runs["teacher"], "vanilla": {**runs["vanilla"], "overrides": cached, "seeds": [1]}}
    runs |= {"dkd": {"config": "dkd_cpu.yaml", "overrides": cached}}
    plan = read_study(write_study({**BUDGET, "runs": runs}), Path("runs"))
    assert [run.label for run in plan] == [
        "teacher, seed 0",
        "dkd, seed 0",
        "teacher, seed 1",
        "vanilla, seed 1",
        "dkd, seed 1",
    ]
    meter = cost.CostMeter(plan)
    assert [meter._finds_logits(run) for run in plan] == [False, False, False, False, True]
    meter.change(plan[3], "data.init_args.image_sizes", [16])  # the teacher sees the views whole
    assert meter._finds_logits(plan[4])
    meter.change(plan[3], "data.init_args.crop", 2)
    assert not meter._finds_logits(plan[4])
    assert not any(cost.CostMeter(plan, at_once=2)._finds_logits(run) for run in plan)


def test_a_config_is_projected(workspace: Path, known_seconds: list[Classifier], capsys):
    """The quickstart, two peers, as it is."""
    assert main(["bench", "project", f"--config={CONFIGS / 'quickstart.yaml'}", "--json=new/folder/minutes.json"]) == 0
    settings = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    data = DigitsDataModule(**settings["data"]["init_args"])
    data.setup()
    figures = json.loads(Path("new/folder/minutes.json").read_text())
    epoch = 4 * (len(data.train_index) // data.batch_size) + 2 * 0.001 * len(data.val_index)
    widths, evaluated = len(settings["quantization"]["bits"]), len(data.val_index) + len(data.test_set)
    assert figures["epochs"] == settings["trainer"]["max_epochs"]
    assert figures["seconds_an_epoch"] == pytest.approx(epoch)
    assert figures["training_minutes"] == pytest.approx(figures["epochs"] * epoch / 60)
    methods = len(settings["quantization"]["methods"])
    rows = methods * widths + 1  # of each network
    assert figures["after_minutes"] == pytest.approx(2 * (3 * methods + rows * evaluated * 0.001) / 60)
    assert f"{figures['training_minutes']:.1f}" in capsys.readouterr().out
    assert main(["bench", "project", "--config=none.yaml"]) == 1
    assert "none.yaml does not exist: give a config" in capsys.readouterr().err
