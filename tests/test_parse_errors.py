"""What is said of a wrong option: which one it is, what it takes, what it got, and the command that tells more."""

from pathlib import Path

import pytest

from kdq_lightning.cli import main
from kdq_lightning.commands.parse_errors import plain_sentence
from tests.conftest import config

TRAINER = "(options: kdq fit --help.trainer)"
OF_MODEL = "(options: kdq fit --model.help MutualLearning)"


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Return what a command prints when it refuses an option: one line."""
    try:
        assert main(arguments) == code
    except SystemExit as stop:
        assert stop.code == code
    error = capsys.readouterr().err
    assert error.startswith("kdq: ") and error.count("\n") == 1
    assert not any(word in error for word in ("<class", "Parser key", "COMMAND", "arguments are required"))
    return error.removeprefix("kdq: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--trainer.max_epochs=ten", f"trainer.max_epochs must be a whole number, got ten {TRAINER}"),
        ("--trainer.limit_val_batches=all", f"trainer.limit_val_batches must be a number, got all {TRAINER}"),
        ("--trainer.enable_progress_bar=2", f"trainer.enable_progress_bar must be true or false, got 2 {TRAINER}"),
        ("--seed_everything=x", "--seed_everything must be a whole number or true or false, got x (options: kdq fit"),
        ("--quantization.bits=two", "quantization.bits must be a list such as [2, 3], got two"),
        ("--quantization.bits=", "quantization.bits must be a list such as [2, 3], got nothing"),
        ("--quantization.budgets=100kB", "quantization.budgets must be a list such as [100kB], got 100kB"),
        ("--model.networks=resnet8", f"model.networks must be a list such as [resnet8], got resnet8 {OF_MODEL}"),
        ("--model.learning_rate=fast", f"model.learning_rate must be a number, got fast {OF_MODEL}"),
        ("--model.optimizer=moun", "model.optimizer must be muon or null, got moun: did you mean muon? (options: kdq"),
        (
            "--data=CIFARDataModule --data.flip=alternat",
            "flip must be true or false or alternate, got alternat: did you mean alternate? (",
        ),
        ("--model.learning_rte=1", f"model.learning_rte is no option, did you mean learning_rate? {OF_MODEL}"),
        (
            "--model=VanillaKD",
            "model.teacher and model.network must be given (options: kdq fit --model.help VanillaKD)",
        ),
        ("--model=torch.nn.Linear", "--model must be a class derived from Classifier, got torch.nn.Linear"),
        ("--data=ImageFolderDataModule", "data.root must be given (options: kdq fit --data.help ImageFolderDataModule"),
        ("--data.batch_size", "--data has no value: write it behind the option; so with --data.name=value"),
        ("--trainer.callbacks=[EarlyStopping]", f"trainer.callbacks.monitor must be given {TRAINER}"),
        ("--trainer.callbacks=EarlyStoping", "got EarlyStoping: did you mean EarlyStopping?"),
        ("--trainer.logger=Wandb", "or a list or true or false, got Wandb: did you mean WandbLogger?"),
        ("--optimizer=Adem", "--optimizer must be the name of a class, got Adem: did you mean Adam?"),
        ("--lr_scheduler=StepLR", "lr_scheduler.step_size must be given (options: kdq fit --help.lr_scheduler)"),
        ("--config=none.yaml", "--config must be a file that can be read: there is none at "),
        ("quickstart", "quickstart is one word too many: options are written --name=value (options: kdq fit --help)"),
    ],
)
def test_options_of_fit(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    assert sentence in said(["fit", "--config", config("quickstart"), *arguments.split()], capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("fit", "--data and --model must be given: begin with --config configs/quickstart.yaml (options: kdq fit --"),
        ("test --trainer.limit_test_batches=x", "must be a number, got x (options: kdq test --help.trainer)"),
        ("export", "PACKED and --to and --out must be given (options: kdq export --help)"),
        (
            "export x --out y --to onix",
            "--to must be one of state_dict, onnx, torch_export, got onix: did you mean on",
        ),
        ("export x --out y --to onnx --image_size big", "--image_size must be a whole number, got big"),
        ("report", "FOLDERS must be given (options: kdq report --help)"),
        ("report x --published=true", "--published takes no value: leave out 'true'"),
        ("study x --dry-run", "--dry-run is no option, did you mean --dry_run? (options: kdq study --help)"),
        ("study x --seeds 0", "--seeds must be a list such as [0], got 0"),
        ("list", "KIND must be given: one of networks, strategies, data, methods (options: kdq list --help)"),
        ("list network", "got network: did you mean networks?"),
        ("bench", "SUBJECT must be given: one of data, step,"),
    ],
)
def test_options_of_commands(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    assert sentence in said(arguments.split(), capsys)


QUICKSTART = Path(config("quickstart")).read_text()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "own.yaml is empty where names with values are expected, as in configs/quickstart.yaml"),
        (b"- a", "own.yaml holds list ['a'] where names with values are expected"),
        (b"\xff\xfe", "own.yaml is no text in UTF-8"),
        (b"model: [", "own.yaml is not valid YAML: line 1, column 9: expected the node content"),
    ],
)
def test_files_that_are_no_configs(content: bytes, sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    Path("own.yaml").write_bytes(content)
    assert sentence in said(["fit", "--config=own.yaml"], capsys, code=1)
    assert sentence.partition(" where")[0] in said(["study", "own.yaml"], capsys, code=1)


@pytest.mark.parametrize(
    ("line", "changed", "sentence"),
    [
        ("max_epochs", "max_epoch", f"trainer.max_epoch is no option, did you mean --trainer.max_epochs? {TRAINER}"),
        ("model:", "modell:", "modell.init_args.networks is no option, did you mean --model?"),
        ("MutualLearning", "MutualLerning", "got MutualLerning: did you mean MutualLearning?"),
        (
            "batch_size: 64",
            "batch_size: big",
            "data.batch_size must be a whole number, got big (options: kdq fit --da",
        ),
    ],
)
def test_lines_of_a_config(line: str, changed: str, sentence: str, workspace: Path, capsys: pytest.CaptureFixture[str]):
    Path("own.yaml").write_text(QUICKSTART.replace(line, changed))
    assert sentence in said(["fit", "--config=own.yaml"], capsys)


def test_an_unknown_message_stays():
    assert plain_sentence('Parser key "a.b":\n  Something else') == "a.b: Something else"
    assert plain_sentence("Something\nelse") == "Something else"
