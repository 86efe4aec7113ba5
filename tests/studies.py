"""A study of two runs of two steps each on digits, and a writer of studies beside copies of the shipped configs."""

import shutil
from pathlib import Path

import yaml

from tests.conftest import CONFIGS

DIGITS = {
    "data": "DigitsDataModule",
    "trainer.accelerator": "cpu",
    "quantization.bits": [2],
    "quantization.calibration_images": 16,
}

TINY = {
    "seeds": [3],
    "overrides": {
        **DIGITS,
        "data.init_args.batch_size": 64,
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "trainer.limit_test_batches": 1,
    },
    "runs": {
        "teacher": {"config": "teacher_cpu.yaml", "overrides": {"model.init_args.network": "resnet8"}},
        "vanilla": {
            "config": "vanilla_cpu.yaml",
            "overrides": {"model.init_args.network": "resnet8", "model.init_args.teacher": "{teacher}"},
        },
    },
}


def write_study(content: object, name: str = "tiny") -> Path:
    """Write a study beside copies of the shipped configs."""
    for config in CONFIGS.glob("*_cpu.yaml"):
        shutil.copy(config, config.name)
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
