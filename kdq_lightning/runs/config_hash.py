"""Computes a hash of a run's settings.

Equal hash means equal settings, except the seed and what has no effect on a result, such as the device.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

WITHOUT_EFFECT = {
    "model": {"teacher_cache"},
    "data": {"root", "download", "seed"},  # the seed is a field of its own
    "trainer": {
        *("accelerator", "devices", "num_nodes", "strategy", "plugins", "default_root_dir", "fast_dev_run"),
        *("logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"),
        *("limit_predict_batches", "inference_mode", "profiler", "detect_anomaly", "barebones"),
        *("enable_autolog_hparams", "model_registry"),
    },
    "quantization": {"bits", "methods", "budgets", "enabled"},  # each bit width, method, budget is a record of its own
}

WHERE_GIVEN = ("optimizer", "lr_scheduler")
"""Sections that count only where they are given."""


def config_hash(config: Mapping[str, Any], weights: str | None = None) -> str:
    """Return 12 hexadecimal digits that tell runs apart which may give different results.

    Two runs that differ only in seed, device, number of ranks, loggers or place share them.

    Args:
        config: What `config.yaml` of a run holds: the sections model, data, trainer and
                quantization count, and an optimizer with its scheduler. Options
            that are None don't, so that a release which adds one still finds its records. Paths of networks below
            `trainer.default_root_dir` count from there. Of images without a name, their folder's name counts.
        weights: What stands for the trained weights instead of their path, for `kdq quantize`: the hash of the run that
            trained them, or a digest of their file.
    """
    what = _what_counts(config)
    if weights is not None:
        what["model"]["init_args"]["weights"] = weights
    return hashlib.blake2b(json.dumps(what, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def _what_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that can change a result, by section, with paths as `config_hash` says."""
    root = Path(config["trainer"].get("default_root_dir") or ".").absolute()
    what = {section: _with_effect(section, config.get(section) or {}) for section in WITHOUT_EFFECT}
    what |= {section: _with_effect(section, config[section]) for section in WHERE_GIVEN if config.get(section)}
    images = (config.get("data") or {}).get("init_args") or {}
    if "dataset" not in images and images.get("root") is not None:
        what["data"]["root"] = Path(images["root"]).resolve().name
    arguments = what["model"].setdefault("init_args", {})
    for key in ("teacher", "packed", "weights"):
        if isinstance(arguments.get(key), str) and Path(arguments[key]).absolute().is_relative_to(root):
            arguments[key] = Path(arguments[key]).absolute().relative_to(root).as_posix()
    return what


def settings_of(version: Path) -> dict[str, Any]:
    """Return the settings in a version's `config.yaml` that can change a result; none if it can't be read.

    Returns:
        Each value by its place in the file, such as `model.init_args.temperature`.
    """
    try:
        what = _what_counts(yaml.safe_load((version / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return {}
    return dict(_leaves(what))


def _leaves(options: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def version_hash(version: Path) -> str | None:
    """Return the hash of the settings in a version's folder; None if its `config.yaml` can't be read."""
    try:
        return config_hash(yaml.safe_load((version / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def _with_effect(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a section's options (a class's `init_args` among them) without those that change no result."""
    ignored = WITHOUT_EFFECT.get(section, set())
    return {
        key: _with_effect(section, value) if isinstance(value, Mapping) else value
        for key, value in options.items()
        if value is not None and key not in ignored
    }
