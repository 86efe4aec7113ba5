"""Studies: plans, what is done, what failed, several at once, and a whole one on digits that is cut off and resumed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from kdq_lightning.cli import main
from kdq_lightning.commands.running import read_settings
from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.runs.records import write_records
from kdq_lightning.study import execution
from kdq_lightning.study.command import still_to_run
from kdq_lightning.study.cost import CostMeter
from kdq_lightning.study.done import find_done
from kdq_lightning.study.plan import read_study
from kdq_lightning.study.progress import Progress, Stage, accuracies, format_seconds, read_stage
from kdq_lightning.study.run import Run
from tests.conftest import CONFIGS
from tests.printed import DrawnMeanwhile
from tests.records import write_run
from tests.studies import TINY, write_study

STUDIES = sorted(CONFIGS.glob("study_*.yaml"))


def test_plan(workspace: Path):
    runs = read_study(write_study(TINY | {"seeds": [0, 7]}), Path("runs"))
    assert [(run.name, run.seed) for run in runs] == [(n, s) for s in (0, 7) for n in ("teacher", "vanilla")]
    student = runs[3]
    assert student.needs == ("teacher",) and student.folder == Path("runs/tiny/seed7/vanilla")
    assert "--model.init_args.teacher=runs/tiny/seed7/teacher" in student.arguments
    assert "--quantization.bits=[2]" in student.arguments
    assert student.line.startswith("kdq fit --config vanilla_cpu.yaml --name vanilla --seed_everything 7 ")
    settings = [read_settings(run.arguments) for run in runs]
    assert settings[1].config["data"]["class_path"].endswith("DigitsDataModule")
    assert settings[1].config["quantization"]["bits"] == (2,)
    hashes = [s.config_hash for s in settings]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]  # of everything but the seed


def test_a_run_may_have_fewer_seeds(workspace: Path):
    seeds = {"teacher": [0, 7], "vanilla": [7]}
    runs = {name: {**entry, "seeds": seeds[name]} for name, entry in TINY["runs"].items()}
    plan = read_study(write_study(TINY | {"seeds": [0, 7, 8], "runs": runs}), Path("runs"))
    assert [(run.name, run.seed) for run in plan] == [("teacher", 0), ("teacher", 7), ("vanilla", 7)]
    for wrong, sentence in (
        ({"teacher": [7], "vanilla": [0]}, "with seed 0"),
        ({"vanilla": [5]}, r"\[5\]: give some of"),
    ):
        runs = {name: {**entry, "seeds": wrong.get(name, [0])} for name, entry in TINY["runs"].items()}
        with pytest.raises(UserError, match=sentence):
            read_study(write_study(TINY | {"seeds": [0, 7], "runs": runs}), Path("runs"))


def test_public_weights(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Weights that are there are quantized, once, and teach; where they are not, the teacher is trained."""
    weights = {"path": "public.safetensors", "network": "resnet8", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    runs = {**TINY["runs"], "teacher": {**TINY["runs"]["teacher"], "weights": weights}}
    path = write_study(TINY | {"seeds": [0, 1], "runs": runs})
    assert [run.command for run in read_study(path, Path("runs"))] == ["fit"] * 4
    assert capsys.readouterr().err == "public.safetensors is not there: teacher is trained instead\n"
    save_file(build_network("resnet8", 10).state_dict(), "public.safetensors")
    plan = read_study(path, Path("runs"))
    assert [(run.name, run.command) for run in plan] == [
        ("teacher", "quantize"),
        ("vanilla", "fit"),
        ("vanilla", "fit"),
    ]
    model = read_settings(plan[2].arguments).config["model"]["init_args"]
    assert model["teacher"] == "public.safetensors" and model["teacher_network"] == "resnet8"
    assert model["teacher_mean"] == (0.5, 0.5, 0.5) and plan[2].needs == ()
    model = read_settings(plan[0].arguments).config["model"]["init_args"]
    assert model["weights"] == "public.safetensors" and model["weights_std"] == (0.2, 0.2, 0.2)


def test_public_weights_of_a_network_with_arguments(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """The run and who learns from it build the network with them; the student's own arguments stay."""
    name, args = "torchvision/mobilenet_v3_small", {"width_mult": 0.5, "dropout": 0.1}
    torch.save({"state_dict": build_network(name, 10, args).state_dict()}, "public.pth")
    weights = {"path": "public.pth", "network": name, "mean": [0.5] * 3, "std": [0.2] * 3, "network_args": args}
    runs = {
        "teacher": {
            "config": "teacher_cpu.yaml",
            "weights": weights,
            "overrides": {"model.init_args.network": name},
        },
        "vanilla": TINY["runs"]["vanilla"],
    }
    quick = {**TINY["overrides"], "quantization.solver": "rounding", "quantization.methods": ["default"]}
    path = write_study(TINY | {"runs": runs, "overrides": quick})
    quantized, student = (read_settings(run.arguments).config["model"] for run in read_study(path, Path("runs")))
    assert quantized["init_args"]["network_args"] == student["init_args"]["teacher_network_args"] == args
    assert student["init_args"]["network_args"] is None
    assert main(["study", str(path)]) == 0, [log.read_text() for log in Path("runs").rglob("*.log")]
    assert main(["study", str(path), "--dry_run"]) == 0
    Path("runs/tiny").rename("other")
    monkeypatch.setattr(CostMeter, "quantization_seconds", lambda *_: 3.0)
    assert main(["study", str(path), "--budget_minutes=60", "--dry_run"]) == 0


STUDY_KEYS = "its keys are runs (dict), seeds (list[int]), overrides (dict)"
RUN_KEYS = "its keys are config (str), overrides (dict), seeds (list[int]), weights (dict)"
WEIGHTS_KEYS = "its keys are path (str), network (str), mean (numbers), std (numbers), network_args (dict)"
BAD = [
    ("runs: [", "is not valid YAML: "),
    ("[3]", "holds list [3] where names with values are expected, as in configs/study_cpu.yaml"),
    ("seeds: [0]", f"the study is not understood: runs must be given; {STUDY_KEYS}"),
    ("runs: {a: {config: teacher_cpu.yaml}}\nbudget: 3", f"budget is no option; {STUDY_KEYS}"),
    ("runs: []", "runs must be a group of names with values, got []"),
    ("runs: {}", "the study has no runs: name at least one"),
    ("runs: {a: {config: teacher_cpu.yaml}}\nseeds: 3", "seeds must be a list such as [3], got 3"),
    ("runs: {a: {config: teacher_cpu.yaml}}\nseeds: [1.5]", "seeds must be a whole number, got 1.5"),
    ("runs: {a: {config: teacher_cpu.yaml}}\nseeds: []", "the study has no seeds: name at least one"),
    ("runs: {a: {config: teacher_cpu.yaml}}\noverrides: 3", "overrides must be a group of names with values, got 3"),
    ("runs: {a: }", f"run a is not understood: Expected keys with values, got None; {RUN_KEYS}"),
    ("runs: {a: {seeds: [0]}}", f"run a is not understood: config must be given; {RUN_KEYS}"),
    (
        "runs: {a: {config: teacher_cpu.yaml, epochs: 3}}",
        f"run a is not understood: epochs is no option; {RUN_KEYS}",
    ),
    ("runs: {a: {config: nothing.yaml}}", "run a names the config nothing.yaml, which does not exist"),
    ("runs: {a: {config: teacher_cpu.yaml, overrides: [x]}}", "run a is not understood: overrides must be a group of"),
    (
        "runs: {a: {config: teacher_cpu.yaml, seeds: [0, 5]}}",
        "run a has the seeds [0, 5]: give some of the study's",
    ),
    ("runs: {a: {config: teacher_cpu.yaml, seeds: []}}", "run a has the seeds []: give some of the study's"),
    (
        "runs: {a: {config: vanilla_cpu.yaml, overrides: {model.init_args.teacher: '{b}'}}}",
        "run a needs {b}, and no",
    ),
    (
        "runs: {a: {config: teacher_cpu.yaml, weights: {path: x, network: y, mean: [1, 2, 3]}}}",
        f"the group weights of run a is not understood: std must be given; {WEIGHTS_KEYS}",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=[text for text, _ in BAD])
def test_bad_studies(text: str, sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    path = write_study({})
    path.write_text(text)
    assert main(["study", str(path)]) == 1
    error = capsys.readouterr().err
    assert "tiny.yaml" in error and sentence in error and error.count("\n") == 1 and not Path("runs").exists()


def test_overrides_reach_the_command_as_they_are_written(workspace: Path):
    """jsonargparse would read text such as 007 as a number."""
    overrides = {"name": "007", "model.init_args.temperature": float("inf"), "quantization.bits": [2], "x": None}
    path = write_study({"runs": {"a": {"config": "teacher_cpu.yaml", "overrides": overrides}}})
    written = ["--name=007", "--model.init_args.temperature=.inf", "--quantization.bits=[2]", "--x=null"]
    assert read_study(path, Path("runs"))[0].arguments[-4:] == written


def test_bad_options(workspace: Path, capsys: pytest.CaptureFixture[str]):
    path = write_study(TINY)
    assert main(["study", "nothing.yaml"]) == 1 and "nothing.yaml cannot be read" in capsys.readouterr().err
    assert main(["study", str(path), "--devices", "0"]) == 1 and "at least 1" in capsys.readouterr().err
    assert main(["study", str(path), "--results", "x"]) == 1 and "is not a folder" in capsys.readouterr().err
    for seeds in ("[3, 4]", "[]"):
        assert main(["study", str(path), "--seeds", seeds]) == 1
        assert f"seeds of the study, some of [3], got {seeds}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model.init_args.learning_rte": 1}, "run a: model.learning_rte is no option, did you mean learning_rate?"),
        ({"trainer.max_epochs": "ten"}, "run a: trainer.max_epochs must be a whole number, got ten"),
        ({"data": "Images"}, "run a: --data must be the name of a class, got Images"),
    ],
)
@pytest.mark.parametrize("planned", [[], ["--budget_minutes=5"]], ids=["", "planned"])
def test_a_wrong_option_is_a_runs(overrides: dict, sentence: str, planned: list, workspace: Path, capsys):
    """The file of a study has options of many runs, so the sentence names the run."""
    path = write_study({"runs": {"a": {"config": "teacher_cpu.yaml", "overrides": overrides}}})
    assert main(["study", str(path), *planned]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"kdq: {sentence}") and error.count("\n") == 1 and not Path("runs").exists()


def test_some_seeds(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Runs of the seeds that are named; public weights are quantized for whichever seed comes first."""
    weights = {"path": "public.safetensors", "network": "resnet8", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    save_file(build_network("resnet8", 10).state_dict(), "public.safetensors")
    runs = {**TINY["runs"], "teacher": {**TINY["runs"]["teacher"], "weights": weights}}
    path = write_study(TINY | {"seeds": [0, 1, 2], "runs": runs})
    assert main(["study", str(path), "--seeds", "[2]", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[1], line.split()[7]) for line in lines] == [("quantize", "0"), ("fit", "2")]


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_shipped_plans(path: Path, workspace: Path):
    """The teacher first, then all strategies; students learn from the teacher of their seed."""
    runs = read_study(path, Path("runs"))
    names = [run.name for run in runs if run.seed == runs[0].seed]
    assert names[:7] == ["teacher", "control", "vanilla", "dml", "dkd", "mixup", "hint"]
    assert len({run.seed for run in runs}) >= 2
    for run in runs:
        assert ("teacher" in run.needs) == (run.name not in ("teacher", "control", "dml"))


@pytest.mark.parametrize("dataset", ["cpu", "cifar10", "cifar100"])
def test_who_shares_the_teachers_answers(dataset: str, workspace: Path):
    """Who shows the teacher the same images as vanilla."""
    runs = read_study(CONFIGS / f"study_{dataset}.yaml", Path("runs"))
    cached = {run.name for run in runs if "--model.init_args.teacher_cache=runs/teacher_logits" in run.arguments}
    assert cached == {"vanilla", "dkd", "hint", "recover_2bit", "recover_3bit", "recover_4bit"}


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_shipped_plans_are_understood(path: Path, workspace: Path):
    runs = read_study(path, Path("runs"))
    hashes = [read_settings(run.settings_arguments).config_hash for run in runs if run.seed == runs[0].seed]
    assert len(set(hashes)) == len(hashes)


def test_done_is_what_has_every_record(workspace: Path):
    """All bit widths and all peers, of this config and seed, wherever they lie."""
    runs = read_study(write_study(TINY), Path("runs"))
    assert find_done(runs, []) == {}
    settings = read_settings(runs[0].arguments).config_hash
    folder = Path("elsewhere/any/version_0")
    for bits, seed, done in (((2,), 3, False), ((2, 32), 2, False), ((2, 32), 3, True)):
        accuracies = dict.fromkeys(bits, 80.0)
        write_run(folder, "teacher", accuracies, seed=seed, network="resnet18", config_hash=settings)
        assert list(find_done(runs, [Path("elsewhere")])) == ([runs[0]] if done else [])
    assert find_done(runs, [Path("elsewhere")])[runs[0]] == [folder]
    # Its weights are not here, and the student, which has no record, needs them.
    assert still_to_run(runs, {runs[0]: [folder]}) == runs
    assert still_to_run(runs, {runs[1]: [folder]}) == runs[:1]
    assert still_to_run(runs, {run: [folder] for run in runs}) == []


def test_done_is_what_has_every_method(workspace: Path):
    """In the run's own folder, where it can go on; records from elsewhere are whole by the first method."""
    run = read_study(write_study(TINY), Path("runs"))[0]
    settings = {"seed": 3, "config_hash": read_settings(run.arguments).config_hash}
    elsewhere, own = Path("elsewhere/any/version_0"), run.folder / "version_0"
    for folder in (elsewhere, own):
        records = write_run(folder, "teacher", {2: 80.0, 32: 90.0}, **settings)
    assert find_done([run], [Path("elsewhere"), Path("runs")]) == {run: [elsewhere]}
    records += write_run(own, "teacher", {2: 70.0}, method="gpfq", **settings)
    write_records(own, records)
    assert find_done([run], [Path("runs")]) == {run: [own]}


def make_runs(*names: str, needs: str = "") -> list[Run]:
    return [
        Run(name, 0, "fit", ("--name", name), Path("runs"), (needs,) * (i > 0 and bool(needs)))
        for i, name in enumerate(names)
    ]


def test_goes_on_past_a_failed_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    called = []

    def fake(arguments: list[str]) -> int:
        name = arguments[2]
        called.append(name)
        print(f"printed by {name}")
        if name == "raises":
            raise RuntimeError("a bug")
        if name == "option":
            raise SystemExit(2)
        return int(name == "fails")

    monkeypatch.setattr(execution, "run_command", fake)
    runs = [*make_runs("fails", "needs it", needs="fails"), *make_runs("raises", "option", "works")]
    progress = Progress(5, 5, 1)
    failed = execution.execute(runs, 1, progress)
    assert [run.name for run in failed] == ["fails", "needs it", "raises", "option"]
    assert called == ["fails", "raises", "option", "works"]
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "5 runs, 0 of them have their records already" and "\x1b" not in out
    assert lines[1] == "[1/5] fails, seed 0: started, log runs/fails.log"
    assert lines[2] == "[1/5] fails, seed 0: FAILED, see runs/fails.log"
    assert "printed by" not in out and out.count("FAILED, see runs/") == 3 and "works, seed 0: done" in out
    assert "a bug" in Path("runs/raises.log").read_text()
    monkeypatch.setattr(execution, "run_command", lambda arguments: (_ for _ in ()).throw(SystemExit(143)))
    with pytest.raises(SystemExit):
        execution.execute(runs[:1], 1, progress)


@pytest.mark.parametrize(("kind", "code"), [(KeyboardInterrupt, 130), (lambda: SystemExit(130), 130),
    (lambda: SystemExit(143), 143)], ids=["Ctrl-C at once", "Ctrl-C after the step", "SIGTERM"])  # fmt: skip
def test_the_last_words_of_a_study(kind, code: int, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Of the first run, which leaves none after it: where it was stopped, and the command that goes on."""
    started = []

    def stop(arguments: list[str]) -> int:
        started.append(arguments)
        raise kind()

    monkeypatch.setattr(execution, "run_command", stop)
    path = write_study(TINY)
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(path), "--seeds=[3]"])
    assert stopped.value.code == code and len(started) == 1
    words = "what is done is kept, go on with: kdq study tiny.yaml '--seeds=[3]'"
    assert capsys.readouterr().err == f"kdq: stopped in teacher, seed 3; {words}\n"


def test_several_at_once(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Never more than the devices; a run starts after the one that it needs; a failure skips only what needs it."""
    running: dict[str, subprocess.Popen] = {}
    most, order = 0, []

    def launch(run: Run, device: int, threads: int) -> subprocess.Popen:
        assert threads == max(len(os.sched_getaffinity(0)) // 2, 1)
        nonlocal most
        alive = [name for name, process in running.items() if process.poll() is None]
        assert not set(run.needs) & set(alive) and set(run.needs) <= set(running)
        most = max(most, len(alive) + 1)
        order.append((run.name, device))
        code = f"import time, sys; time.sleep(0.5); sys.exit({int(run.name == 'b')})"
        running[run.name] = subprocess.Popen([sys.executable, "-c", code])
        return running[run.name]

    monkeypatch.setattr(execution, "_launch", launch)
    runs = [*make_runs("a", "a1", "a2", "a3", needs="a"), *make_runs("b", "b1", needs="b")]
    failed = execution.execute(runs, 2, Progress(6, 6, 2))
    assert [run.name for run in failed] == ["b", "b1"] and most == 2
    assert sorted(name for name, _ in order) == ["a", "a1", "a2", "a3", "b"]
    assert order[:2] == [("a", 0), ("b", 1)]


def test_remaining_time():
    progress = Progress(4, 4, devices=1)
    fast, slow, other = make_runs("fast", "slow", "other")
    assert progress.remaining([slow]) is None
    progress.seconds = {"fast": [10.0, 20.0], "slow": [60.0]}
    assert progress.remaining([fast, slow, other]) == pytest.approx(15 + 60 + 30)
    assert progress.remaining([]) is None
    assert [format_seconds(s) for s in (59.6, 600, 7200)] == ["60 s", "10 min", "2.0 h"]


def test_what_a_run_is_doing(workspace: Path):
    """By its log, of which a part may be that of an earlier command."""
    run = make_runs("run")[0]
    assert read_stage(run) == Stage("starting")
    run.log.parent.mkdir()
    run.log.write_text("epoch 9/9  train 12.0 %\n")
    begin = run.log.stat().st_size
    assert read_stage(run) == Stage("quantizing", 1.0) and read_stage(run, begin) == Stage("starting")
    with run.log.open("a") as log:
        log.write("an epoch 7/8  of no line\n" + "epoch 1/4  train 12.0 %\nepoch 2/4  train 20.0 %\n" + 500 * "x\n")
    assert read_stage(run, begin) == Stage("epoch 3/4", 0.5)
    run.log.write_text("epoch 5  train 12.0 %\n")
    assert read_stage(run) == Stage("epoch 6")
    assert read_stage(Run("run", 0, "quantize", (), Path("runs"), ())) == Stage("quantizing")


def test_a_terminal_shows_what_is_going(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run, epoch, time left and log; nothing of it stays, and the lines of the runs that ended do."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    first, second = make_runs("first", "second")
    for run in (first, second):
        run.log.parent.mkdir(exist_ok=True)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("kdq_lightning.study.progress.monotonic", lambda: next(clock))
    Path("runs/seed0/done/version_3").mkdir(parents=True)
    progress = Progress(3, 2, 1, {make_runs("done")[0]: [Path("runs/seed0/done/version_3")]})
    progress.start(first, [first, second])
    first.log.write_text("epoch 1/2  train 9.0 %\n")
    shown = progress._shown().plain.splitlines()
    assert shown[:2] == ["[1/2] first, seed 0: epoch 2/2, 10 s", "      log runs/first.log"]
    assert shown[2] == "      60 s left"  # 20 s are half of the first; as long for the second
    write_run(first.folder / "version_0", "control", {2: 70, 4: 80, 32: 90}, peers=("peer0", "peer1"))
    (first.folder / "version_0" / "finished").touch()
    progress.finish(first, True, [second])
    said = capsys.readouterr().out
    assert "3 runs, 1 of them have their records already\n  1 in runs/seed0\n" in said and "started" in said
    assert "[1/2] first, seed 0: done in 30 s, float 89.5 %, 2 bits 69.5 %; 30 s left\n" in said
    with progress:
        progress.start(second, [second])
        assert progress.live.is_started
        meanwhile = DrawnMeanwhile(progress.live.refresh)
        progress.console.push_render_hook(meanwhile)
        progress.finish(second, False, [])
        assert meanwhile.finished == [False]
        progress.console.pop_render_hook()
    assert not progress.live.is_started
    said = capsys.readouterr().out
    assert "started" not in said and "[2/2] second, seed 0: FAILED, see runs/second.log" in said


def test_the_accuracy_of_a_run(workspace: Path):
    """The float network's and that at the fewest bits, of the best known method; a recovered run has one alone."""
    (run,) = make_runs("run")
    assert accuracies(run) == []
    records = write_run(run.folder / "version_0", "recover", {3: 80})
    (run.folder / "version_0" / "finished").touch()
    assert accuracies(run) == [f"3 bits {records[0].test_top1:.1f} %"]
    write_run(run.folder / "version_0", "control", {2: 60}, method="gpfq")
    assert accuracies(run) == []


ONE_METHOD = {**TINY, "overrides": {**TINY["overrides"], "quantization.methods": ["default"]}}


def test_a_whole_study(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Run, run again with nothing to do, cut off in three ways and resumed: the same report to the byte."""
    path = write_study(ONE_METHOD)
    assert main(["study", str(path), "--dry_run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 and not Path("runs").exists()
    assert main(["study", str(path)]) == 0, [log.read_text() for log in Path("runs").rglob("*.log")]
    out = capsys.readouterr().out
    assert "2 runs, 0 of them" in out and "[1/2] teacher, seed 3: done" in out and "left" in out
    report = {file.name: file.read_bytes() for file in Path("runs/tiny/report").iterdir()}
    assert b"equal bytes" in report["report.md"] and b", partial" in report["report.md"]
    assert main(["study", str(path)]) == 0 and "2 of them have their records already" in capsys.readouterr().out

    vanilla = Path("runs/tiny/seed3/vanilla/version_0")
    (vanilla / "quantized.csv").unlink()  # killed after training
    assert main(["study", str(path)]) == 0
    assert [folder.name for folder in vanilla.parent.iterdir()] == ["version_0"]  # gone on with, not trained again
    shutil.rmtree(vanilla)
    vanilla.mkdir()  # killed before the first checkpoint
    shutil.copytree("runs/tiny/seed3/teacher", "elsewhere/teacher")
    shutil.rmtree("runs/tiny/seed3/teacher")  # done on another machine, and the student needs its weights
    assert main(["study", str(path), "--results", "elsewhere"]) == 0
    assert (vanilla.parent / "version_1" / "finished").exists()
    assert {file.name: file.read_bytes() for file in Path("runs/tiny/report").iterdir()} == report


@pytest.mark.slow(seconds=35)
@pytest.mark.parametrize("is_whole", [False, True])
def test_who_learned_from_a_teacher_that_is_trained_again_learns_again(is_whole: bool, workspace: Path, capsys):
    """Its students start anew, done or cut off, and what recovers their files; runs without a teacher stay done."""

    def left(path: Path) -> set[str]:
        capsys.readouterr()
        assert main(["study", str(path), "--dry_run"]) == 0
        return {line.split(" --name ")[1].split()[0] for line in capsys.readouterr().out.splitlines() if line}

    def newest(name: str) -> str:
        return max(folder.name for folder in Path("runs/tiny/seed3", name).glob("version_*"))

    small = TINY["runs"]["teacher"]["overrides"]
    more = {
        "dkd": {**TINY["runs"]["vanilla"], "config": "dkd_cpu.yaml"},
        "control": {"config": "control_cpu.yaml", "overrides": small},
    }
    runs = {
        **TINY["runs"],
        **(more if is_whole else {}),
        "recover": {
            "config": "recover_cpu.yaml",
            "overrides": {
                **TINY["runs"]["vanilla"]["overrides"],
                "model.init_args.packed": "{vanilla}",
                "model.init_args.bits": 2,
            },
        },
    }
    learned = {"vanilla", "recover", *(["dkd"] if is_whole else [])}
    first = write_study({**ONE_METHOD, "runs": runs}).read_text()
    assert main(["study", "tiny.yaml"]) == 0 and left(Path("tiny.yaml")) == set()
    cut_off = "dkd" if is_whole else "vanilla"
    for name in ("finished", "quantized.csv"):
        Path("runs/tiny/seed3", cut_off, "version_0", name).unlink()
    longer = {**runs["teacher"], "overrides": {**small, "trainer.max_epochs": 2}}
    path = write_study({**ONE_METHOD, "runs": {**runs, "teacher": longer}})
    assert left(path) == {"teacher", cut_off}
    assert main(["study", str(path)]) == 0 and left(path) == set()
    for name in ("teacher", *learned):
        assert newest(name) == "version_1", name
    assert not is_whole or newest("control") == "version_0"
    path.write_text(first)  # the first teacher's records are there, its weights are not
    assert left(path) == {"teacher"}
    assert main(execution.arguments_of(read_study(path, Path("runs"))[0])) == 0  # and the study is killed
    assert left(path) == learned and newest("teacher") == "version_2"


def test_a_teacher_with_its_classes_in_another_order(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """What it taught stays done, as long as its weights are the same, and is gone on with where it was cut off."""
    backwards = {
        "data": "tests.test_class_names.Backwards",
        "data.init_args.root": "x",
        "data.init_args.val_size": 0.1,
        "data.init_args.batch_size": 64,
    }
    teacher, vanilla = TINY["runs"].values()
    vanilla = {**vanilla, "overrides": {**backwards, **vanilla["overrides"]}}
    path = write_study(ONE_METHOD | {"runs": {"teacher": teacher, "vanilla": vanilla}})
    assert main(["study", str(path)]) == 0, [log.read_text() for log in Path("runs").rglob("*.log")]
    assert "in another order" in " ".join(Path("runs/tiny/seed3/vanilla.log").read_text().split())
    student = read_study(path, Path("runs"))[1]
    finished, checkpoint = student.folder / "version_0/finished", Path("runs/tiny/seed3/teacher/version_0/checkpoints")
    for has_other_weights in (False, True):
        if has_other_weights:
            content = torch.load(checkpoint / "best.ckpt", weights_only=True)
            content["state_dict"]["network.conv1.weight"] *= 2
            torch.save(content, checkpoint / "best.ckpt")
        capsys.readouterr()
        assert main(["study", str(path), "--dry_run"]) == 0
        assert ("--name vanilla" in capsys.readouterr().out) == has_other_weights
        finished.unlink()
        assert ("--ckpt_path" not in execution.arguments_of(student)) == has_other_weights
        finished.touch()


@pytest.mark.slow
def test_other_settings_start_again(workspace: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing of what is there counts, and nothing is resumed."""
    assert main(["study", str(write_study(TINY))]) == 0
    changed = TINY | {"overrides": TINY["overrides"] | {"quantization.calibration_images": 20}}
    capsys.readouterr()
    assert main(["study", str(write_study(changed))]) == 0
    assert "2 runs, 0 of them" in capsys.readouterr().out
    assert Path("runs/tiny/seed3/vanilla/version_1/finished").exists()


@pytest.mark.slow(seconds=300)
@pytest.mark.timeout(1800)
def test_killed_quickstart_study(workspace: Path):
    """Killed at any moment, the quickstart's study goes on to the report of an unbroken one.

    A seed takes under 160 seconds of a processor, however busy the machine is: three take two cores four minutes.
    """
    study = ["study", str(CONFIGS / "study_quickstart.yaml"), "--seeds", "[0]"]
    command = [sys.executable, "-m", "kdq_lightning.cli", *study]
    before = os.times()
    subprocess.run(command, check=True)
    after = os.times()
    assert sum(after[2:4]) - sum(before[2:4]) < 160  # user and system, of processes that have ended
    folder = Path("runs/study_quickstart/report")
    report = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree("runs")
    for seconds in (15, 30, 40):
        process = subprocess.Popen(command)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == report


def test_two_processes_see_their_gpus(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    """Each process has one of the visible GPUs, and its share of the cores."""
    seen = []

    class FakeProcess:
        def __init__(self, command: list[str], env: dict[str, str], **_: object):
            seen.append((env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"], command[3:6]))

    monkeypatch.setattr(execution.subprocess, "Popen", FakeProcess)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = make_runs("a", "b")
    execution._launch(first, 0, threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user knows better
    execution._launch(second, 1, threads=3)
    assert seen == [("4", "3", ["fit", "--name", "a"]), ("6", "5", ["fit", "--name", "b"])]


def test_plan_needs_a_readable_file(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_study(tmp_path / "none.yaml", Path("runs"))


def test_a_plan_knows_every_run(workspace: Path, capsys: pytest.CaptureFixture[str]):
    path = write_study(TINY)
    Path("runs/tiny").mkdir(parents=True)
    planned = {"teacher": {"options": {"trainer.max_epochs": 7}, "minutes": 1.0}}
    Path("runs/tiny/plan.yaml").write_text(yaml.safe_dump({"runs": planned}))
    with pytest.raises(UserError, match="knows nothing of vanilla: delete it"):
        read_study(path, Path("runs"))
    Path("runs/tiny/plan.yaml").write_text(yaml.safe_dump({"runs": {**planned, "vanilla": planned["teacher"]}}))
    assert all("--trainer.max_epochs=7" in run.arguments for run in read_study(path, Path("runs")))
