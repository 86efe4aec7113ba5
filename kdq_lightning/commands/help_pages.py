"""The first page of `kdq fit --help` and of the other commands with a model; it needs neither torch nor a parser.

The whole list of options has hundreds of lines, so the page shows those that people use, and says how to see the rest.
"""

from typing import NamedTuple


class Page(NamedTuple):
    """What the first page of a command says.

    Attributes:
        about: What the command does.
        examples: Commands as they are typed.
        groups: Names of `OPTIONS` that it shows.
        ckpt_path: What `--ckpt_path` is to the command.
    """

    about: str
    examples: tuple[str, ...]
    groups: tuple[str, ...]
    ckpt_path: str


WEIGHTS = "trained: run folder, checkpoint or file"
GIVEN = ("kdq {} --config configs/quickstart.yaml --ckpt_path runs/quickstart",)

PAGES = {
    "fit": Page(
        "Train a network, then quantize it at each bit width.",
        (
            "kdq fit --config configs/quickstart.yaml",
            "kdq fit --config configs/quickstart.yaml --ckpt_path last",
        ),
        ("run", "network", "images", "training", "quantization"),
        "go on with a run: last, or its folder",
    ),
    "test": Page("Accuracy of a trained network on the test images.", GIVEN, ("run", "network", "images"), WEIGHTS),
    "validate": Page(
        "Accuracy of a trained network on the validation images.", GIVEN, ("run", "network", "images"), WEIGHTS
    ),
    "predict": Page("The class of each image, as a CSV file.", GIVEN, ("run", "predict", "network", "images"), WEIGHTS),
    "quantize": Page(
        "Quantize a trained network at each bit width, without training.",
        GIVEN,
        ("run", "network", "images", "quantization"),
        WEIGHTS,
    ),
}

OPTIONS = {
    "run": {
        "--config FILE": "options as YAML; the command line wins",
        "--ckpt_path PATH": "",  # differs by command
        "--name NAME": "run's folder in runs/; default: FILE's name",
        "--seed_everything N": "seed of all that is random; default: 0",
        "--trainer.default_root_dir DIR": "in place of runs/",
        "--print_config": "print every option with its value, and stop",
    },
    "predict": {"--images DIR": "images to predict; default: the test images"},
    "network": {
        "--model CLASS": "how to train: kdq list strategies",
        "--model.network NAME": "such as resnet18: kdq list networks",
        "--model.weights PATH": "trained weights to start from",
        "--model.teacher PATH": "run folder or weights of the teacher",
    },
    "images": {
        "--data CLASS": "where they come from: kdq list data",
        "--data.root DIR": "the folder that they lie in",
        "--data.batch_size N": "images a step",
    },
    "training": {
        "--trainer.max_epochs N": "how often each image is seen",
        "--model.learning_rate X": "peak of the schedule",
        "--trainer.devices N": "GPUs, or processes on a CPU",
        "--trainer.precision NAME": "auto, 32-true, bf16-mixed, ...",
        "--trainer.limit_train_batches N": "batches an epoch, to try things out",
    },
    "quantization": {
        "--quantization.bits [2,4]": "bit widths, 1 to 8",
        "--quantization.methods [default]": "kdq list methods",
        "--quantization.budgets [100kB]": "sizes of files whose layers differ in bits",
        "--quantization.test false": "leave the test images alone",
        "--quantization.enabled false": "only train",
    },
}
"""Options and what they do, by group."""

REST = {
    "--help.trainer": "all options of Lightning's Trainer",
    "--help.quantization": "all options of the quantization",
    "--help.optimizer": "optimizers in place of SGD",
    "--help.lr_scheduler": "their schedules",
    "--model.help VanillaKD": "all options of a strategy",
    "--data.help DigitsDataModule": "all options of a source of images",
    "--help.all": "everything, with environment variables",
}

COLUMN = 36  # at which the texts begin


def first_page(command: str) -> str:
    """Return the help of `kdq fit`, `test`, `validate`, `predict` or `quantize`, as text of at most 80 columns."""
    page = PAGES[command]
    groups = {name: dict(OPTIONS[name]) for name in page.groups} | {"more": REST}
    groups["run"]["--ckpt_path PATH"] = page.ckpt_path
    lines = [f"usage: kdq {command} --config FILE [--option=value ...]", "", page.about, ""]
    lines += [f"  {example.format(command)}" for example in page.examples]
    for name, options in groups.items():
        lines += ["", f"{name}:", *(f"  {option:<{COLUMN - 2}}{text}" for option, text in options.items())]
    return "\n".join(lines) + "\n"
