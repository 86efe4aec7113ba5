"""A run of any other Lightning project as quantization reads it: any LightningModule, on loaders or any datamodule."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdq_lightning.errors import UserError, check_range
from kdq_lightning.evaluation import evaluate_batches, full_float32
from kdq_lightning.random_draws import random_uniform
from kdq_lightning.runs.trained_network import state_dict_bytes
from kdq_lightning.training.lightning_internals import set_up_validation_loaders
from kdq_lightning.training.loaders import (
    OWN_EVALUATION,
    batch_size_of,
    in_order,
    labelled,
    one_loader,
    read_items,
    test_loaders,
)
from kdq_lightning.training.source import Evaluations, Source

Evaluate = Callable[[nn.Module, DataLoader[Any]], dict[str, float]]
"""What a user evaluates a network with: it returns numbers by name; `top1`, in percent, is drawn as the accuracy."""

SEED = 0  # of the calibration images, whatever the run's seed


class PlainRun(Source):
    """The networks of a LightningModule, and the data sets of its loaders.

    Images are read by their index from the data sets, not through the loaders, whose order differs with the run's seed
    and the number of processes.

    Attributes:
        module: The trained module.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, network: str | None, evaluate: Evaluate | None, test: bool
    ) -> None:
        """Find networks and loaders.

        Args:
            trainer: Whose loaders are set up.
            module: The module.
            network: Name of its network among its submodules; None if there is only one it can be.
            evaluate: Of the user; None measures the accuracy on batches (inputs, labels).
            test: Whether the test images are evaluated.

        Raises:
            UserError: If there is no such network, or images can't be read by their index.
        """
        super().__init__(trainer)
        self.module = module
        self._networks = find_networks(module, network)
        self._evaluate = evaluate
        self.has_vectors = evaluate is None
        self._train = one_loader(trainer.train_dataloader, "training")
        set_up_validation_loaders(trainer)
        found = {"val": one_loader(trainer.val_dataloaders, "validation")}
        if test:
            found["test"] = one_loader(test_loaders(trainer, module), "test")
        counts = {
            split: self.limited(split, len(loader.dataset), batch_size_of(loader))  # type: ignore[arg-type]
            for split, loader in found.items()
            if loader
        }
        self._loaders = {
            split: in_order(loader, range(counts[split])) for split, loader in found.items() if loader and counts[split]
        }
        self.splits = {split: counts[split] for split in self._loaders}
        self.partial = any(
            counts[split] < len(loader.dataset)  # type: ignore[arg-type]
            for split, loader in found.items()
            if loader
        )
        self.repeat = "call trainer.fit again with ckpt_path"
        if self._train is None:
            raise UserError("PostTrainingQuantization needs a training loader, whose images it calibrates on")
        if not self.splits:
            raise UserError(
                "PostTrainingQuantization has no image to evaluate on: give a validation loader, or a datamodule with"
                " a test loader"
            )
        if min(self.splits.values()) < trainer.world_size:
            raise UserError(f"{min(self.splits.values())} images can't be shared among {trainer.world_size} processes")

    @property
    def names(self) -> list[str]:
        """The names that the module gives, or the name of its attribute."""
        return list(self._networks)

    def identify(self, **options: object) -> None:
        """Set the `config_hash` from the weights and what is done with them.

        Args:
            **options: Of the callback.
        """
        evaluate = getattr(self._evaluate, "__qualname__", repr(type(self._evaluate)))
        settings = {**options, "evaluate": evaluate, "splits": self.splits}
        digest = hashlib.blake2b(repr(sorted(settings.items())).encode(), digest_size=6)
        for name in self.names:
            digest.update(state_dict_bytes(self.network(name)))
        self.config_hash = digest.hexdigest()

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """Those that the module has saved, and what its records say of the run."""
        fields = self.fields(self.names[0])
        return {
            **{name: fields[name] for name in ("run", "dataset", "strategy", "seed", "epochs")},
            **self.module.hparams,
        }

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a network's records that don't depend on the bit width.

        The class of the module stands for the strategy, that of the data for the data set.
        """
        assert self._train is not None
        data = self.trainer.datamodule or self._train.dataset  # type: ignore[attr-defined]
        has_peers = len(self.names) > 1
        return {
            "run": self.run_name,
            "dataset": type(data).__name__,
            "strategy": type(self.module).__name__,
            "network": type(self._networks[name]).__name__ if has_peers else name,
            "peer": name if has_peers else "",
            "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "epochs": self.trainer.max_epochs if (self.trainer.max_epochs or -1) > 0 else None,
            "partial": self.partial,
        }

    def metadata(self, name: str) -> dict[str, str]:
        """Return the classes of module and network."""
        return {"module": type(self.module).__qualname__, "class": type(self._networks[name]).__qualname__}

    # --- weights

    def network(self, name: str) -> nn.Module:
        """Return a copy of a network with its best weights, in float32 and eval mode, on the device."""
        network = copy.deepcopy(self._networks[name]).float()
        if self._best:
            places = {id(module): place for place, module in self.module.named_modules()}
            prefix = f"{places[id(self._networks[name])]}."
            state = {key.removeprefix(prefix): v for key, v in self._best.items() if key.startswith(prefix)}
            network.load_state_dict(state)
        return network.to(self.device).eval()

    @cached_property
    def _best(self) -> dict[str, Tensor]:
        """The state dict of the best checkpoint; empty if there is none, so that the module's own weights are used."""
        path = Path(getattr(self.trainer.checkpoint_callback, "best_model_path", "") or "/")
        if not path.is_file():
            return {}
        # This run has written the file itself, and foreign hyper-parameters need not be plain data.
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        return state

    # --- images

    def inputs(self, name: str, count: int) -> Tensor:
        """Return this process's share of the calibration images; see `Source.inputs`."""
        return self._calibration(count)

    def check(self, count: int) -> None:
        """Try what quantization will do with images, on a few of them, so that it is refused before training.

        Args:
            count: Calibration images of all processes together; fewer training images are all taken, which is said.

        Raises:
            UserError: If there are fewer images than processes, or batches or outputs are not what they have to be.
        """
        check_range("calibration_images", count, low=1, including_low=True)
        if count > self._training_images:
            rank_zero_warn(f"all {self._training_images} training images are calibrated on: {count} are asked for")
        with isolate_rng(), torch.no_grad(), full_float32(self.device):  # training goes as it would without this
            self._calibration(count, first=1)
            if self._evaluate is not None:
                return
            inputs, labels, _ = next(self._batches(self.main_split))
            outputs = {name: self.network(name)(inputs) for name in self.names}
        for name, logits in outputs.items():
            if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(labels):
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                what = f"{name} returns {found} for {len(labels)} images, not (images, classes)"
                raise UserError(f"{what}: {OWN_EVALUATION}")

    @property
    def _training_images(self) -> int:
        assert self._train is not None
        return len(self._train.dataset)  # type: ignore[arg-type]

    @lru_cache(maxsize=1)  # noqa: B019 - lives as long as the run is quantized
    def _calibration(self, count: int, first: int | None = None) -> Tensor:
        """Return this process's share of the calibration images, or the first few of it, on the device."""
        assert self._train is not None
        count = min(count, self._training_images)
        if count < self.trainer.world_size:
            raise UserError(f"{count} calibration images can't be shared among {self.trainer.world_size} processes")
        chosen = random_uniform(SEED, torch.arange(self._training_images)).argsort(stable=True)[:count]
        batch = read_items(self._train, chosen[self.share(count)][:first].tolist(), SEED)
        inputs = batch[0] if isinstance(batch, Sequence) else batch
        if not isinstance(inputs, Tensor):
            raise UserError(
                f"the training loader gives a {type(inputs).__name__} where the network's inputs are expected: batches"
                " are a tensor, or begin with one"
            )
        return inputs.to(self.device)

    def evaluate(self, name: str, network: nn.Module, progress: Callable[[int], None]) -> Evaluations:
        """Evaluate a network on every split; every process does all of it if a user's own function does."""
        if self._evaluate is None:
            return {split: evaluate_batches(network, self._batches(split), progress) for split in self._loaders}
        found = {}
        for split, loader in self._loaders.items():
            with torch.no_grad(), full_float32(self.device):
                numbers = self._evaluate(network.eval(), loader)
            if not isinstance(numbers, Mapping) or not numbers:
                raise UserError(f"evaluate returned {numbers!r}: it returns numbers by name, such as {{'top1': 91.5}}")
            found[split] = {str(key): float(value) for key, value in numbers.items()}
            progress(self.splits[split])
        return found

    def _batches(self, split: str) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Yield this process's batches of a split: inputs, labels, and the places of the images."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        whole = self._loaders[split]
        mine = range(rank, self.splits[split], world_size)
        done = 0
        for batch in in_order(whole, mine):
            inputs, labels = labelled(batch)
            index = torch.tensor(mine[done : done + len(labels)], dtype=torch.int64)
            done += len(labels)
            yield move_data_to_device(inputs, self.device), labels, index

    def measured(self, evaluations: Evaluations, floats: Evaluations | None) -> dict[str, Any]:
        """Return the fields of a record that come from evaluations; a user's numbers become columns of their own."""
        if self.has_vectors:
            return super().measured(evaluations, floats)
        numbers = {
            f"{split}_{key}": value
            for split, found in evaluations.items()
            if isinstance(found, dict)
            for key, value in found.items()
        }
        absent = ("agreement_float", "agreement_teacher", "flips", "nll", "ece")
        known = {f"{split}_{key}": None for split in ("val", "test") for key in ("top1", "top5")}
        return {
            **dict.fromkeys(absent),
            **{key: numbers.pop(key, None) for key in known},
            "unknown": {key: f"{value:.6g}" for key, value in numbers.items()},
        }


def find_networks(module: LightningModule, name: str | None) -> dict[str, nn.Module]:
    """Return the networks of a module by name.

    They are the module that is named; else what its method `networks()` returns; else its only child with parameters.

    Args:
        module: The module.
        name: Dotted name of a submodule; None if not given.

    Raises:
        UserError: If there is no such submodule, or several children could be it.
    """
    if name is not None:
        try:
            return {name: module.get_submodule(name)}
        except AttributeError as error:
            raise UserError(
                f"{type(module).__name__} has no submodule {name!r}: name the network's attribute"
            ) from error
    if callable(getattr(type(module), "networks", None)):
        return dict(module.networks())  # type: ignore[operator]
    children = {key: child for key, child in module.named_children() if next(child.parameters(), None) is not None}
    if len(children) != 1:
        found = f"several children with parameters ({', '.join(children)})" if children else "no child with parameters"
        raise UserError(
            f"{type(module).__name__} has {found}: give PostTrainingQuantization(network=...) the name of the one to"
            " quantize, or the module a method networks()"
        )
    return children
