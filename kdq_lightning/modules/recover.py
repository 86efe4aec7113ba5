"""Recovery after quantization: the codes stay, and scales, biases and BatchNorm are trained by distillation."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import UserError, check_range
from kdq_lightning.files import file_digest
from kdq_lightning.losses import kd_loss
from kdq_lightning.modules.classifier import Classifier, Losses
from kdq_lightning.modules.distillation import Distillation
from kdq_lightning.modules.schedule import Cycle, one_cycle
from kdq_lightning.modules.teacher import Teacher
from kdq_lightning.modules.vanilla import VanillaKD
from kdq_lightning.networks import class_dimensions
from kdq_lightning.quantization.codebooks import QuantizedWeight
from kdq_lightning.quantization.gram import weight_name
from kdq_lightning.quantization.methods import DEFAULT_METHOD, MIXED_METHOD
from kdq_lightning.quantization.packing import read_metadata, read_weights
from kdq_lightning.runs.checkpoints import find_packed, load_trained
from kdq_lightning.runs.trained_network import load_state


class Recover(Distillation):
    """Trains a packed network on τ²·KL(target ‖ network), without labels; its codes stay as they are.

    Trained are the scales, through a gain each that starts at 1, biases, and BatchNorm's weight and bias; BatchNorm is
    in eval mode throughout. The target is the teacher for a student, the float network for a quantized teacher. The
    packed file of the result has the size of the one that it came from: quantize-then-distil at equal bytes.
    """

    is_quantized = True

    def __init__(
        self,
        packed: str,
        bits: int | None = None,
        method: str | None = None,
        temperature: float = 4.0,
        learning_rate: float = 0.002,
        strategy: str = "recover",
        **kwargs: Any,
    ) -> None:
        """Name the packed file; it is read when training starts.

        Args:
            packed: A packed file, or a run folder, whose newest finished version has one at `bits`.
            bits: Bit width, if `packed` is a run folder; of several peers, the first one's file is taken. Of a file of
                mixed bits its budget in bytes.
            method: Method that made the file, if `packed` is a run folder; `default` if not given.
            temperature: τ > 0 that softens both networks; `.inf` for logit matching.
            learning_rate: Peak of the schedule, taken as it is, for the batch size of the config.
            strategy: What records call this run.
            **kwargs: Those of `Distillation`; `network` is the one in the packed file.
        """
        super().__init__(strategy=strategy, learning_rate=learning_rate, **kwargs)
        check_range("temperature", temperature, low=0)
        self.packed, self.bits, self.method, self.temperature = packed, bits, method or DEFAULT_METHOD, temperature
        self.budget = 0  # of a file of mixed bits, in bytes
        self.gains = nn.ParameterList()
        self._weights: dict[str, QuantizedWeight] = {}  # as they were packed
        self._digest = ""  # of the packed file

    @classmethod
    def for_timing(cls, options: Mapping[str, Any], teacher: Teacher | None, is_cached: bool) -> Classifier:
        """Build vanilla distillation of the same network, which costs as much or more and needs no packed file."""
        given = {name: options[name] for name in ("network", "num_classes")}
        return VanillaKD.for_timing(given, teacher, is_cached)

    def setup(self, stage: str) -> None:
        """Load the packed network; without its file, only training is impossible."""
        if not self._weights and (stage == "fit" or Path(self.packed).exists()):
            self._load_packed(find_packed(self.packed, self.bits, self.method))
        super().setup(stage)

    def _load_packed(self, path: Path) -> None:
        metadata = read_metadata(path)
        network, classes = metadata.get("network"), metadata.get("num_classes")
        if (network, classes) != (self.network_name, str(self.num_classes)):
            raise UserError(
                f"{path} holds a {network} with {classes} classes, not a {self.network_name} with {self.num_classes}:"
                " give --model.init_args.network its name, or another file"
            )
        (trained,) = load_trained(path, self.weights_description).values()
        ordered, weights = self.for_data(trained), read_weights(path)
        if ordered.class_names != trained.class_names:
            weights = self._reordered(weights, [trained.class_names.index(name) for name in ordered.class_names])
        load_state(self.network, ordered.state, path)
        self.statistics = ordered.statistics
        self._weights, self._digest = weights, file_digest(path)
        self.method = metadata.get("method", DEFAULT_METHOD)
        self.budget = int(metadata.get("budget", path.stat().st_size))
        for i, weight in enumerate(self._weights.values()):
            self.gains.append(nn.Parameter(torch.ones_like(weight.scale)))
            self.register_buffer(f"levels{i}", weight.grid[weight.codes.long()], persistent=False)
            self.register_buffer(f"scale{i}", weight.scale, persistent=False)
        for parameter in self.network.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        self.network.eval()  # Lightning leaves the mode of modules as it finds it

    def _reordered(self, weights: dict[str, QuantizedWeight], places: list[int]) -> dict[str, QuantizedWeight]:
        """Return quantized weights with those of the last layer in the order of the data's classes.

        Args:
            weights: By layer.
            places: The present row of each class.
        """
        layers = [
            name
            for name in weights
            if class_dimensions(self.network_name, self.network_args).get(weight_name(name)) == 0
        ]
        moved = {
            name: replace(
                weights[name],
                codes=weights[name].codes[places],
                scale=weights[name].scale if weights[name].scale.numel() == 1 else weights[name].scale[places],
            )
            for name in layers
        }
        return weights | moved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the digest of the packed file, whose codes these scales belong to, into the checkpoint."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["packed"] = self._digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other codes.

        Raises:
            UserError: If the packed file has changed.
        """
        super().on_load_checkpoint(checkpoint)
        if self._weights and checkpoint.get("packed", self._digest) != self._digest:
            raise UserError(
                f"the packed file in {self.packed} is not the one that this run began with: put that one back, or start"
                " again without --ckpt_path"
            )

    def train(self, mode: bool = True) -> "Recover":
        """Set the mode of the module, but keep the network in eval mode, so that BatchNorm's statistics stay."""
        super().train(mode)
        self.network.eval()
        return self

    def cycles(self, total: int, warmup: float) -> list[tuple[list[nn.Module], Cycle]]:
        """Return the network and the gains with one learning rate."""
        return [([self.network, self.gains], one_cycle(total, warmup))]

    def quantized_weights(self) -> dict[str, Tensor]:
        """Return the weights by their names in the network, each gain · scale · level."""
        found = {}
        for i, (name, gain) in enumerate(zip(self._weights, self.gains, strict=True)):
            levels, scale = getattr(self, f"levels{i}"), getattr(self, f"scale{i}")
            found[f"{name}.weight"] = (gain * scale).reshape(-1, *[1] * (levels.ndim - 1)) * levels
        return found

    def losses(self, view: View) -> Losses:
        """Return τ²·KL(target ‖ network)."""
        logits: Tensor = functional_call(self.network, self.quantized_weights(), (self.normalized(view.resized),))
        kd = kd_loss(logits, self.cached_teacher_logits(view), self.temperature)
        return Losses(kd, {"kd": kd}, logits)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Write the weights into the network, which validation, checkpoints and everyone else read."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for name, weight in self.quantized_weights().items():
                self.network.get_parameter(name).copy_(weight)

    @property
    def packed_row(self) -> tuple[str, int]:
        """The method that made the packed file, and its bit width; of mixed bits its budget in bytes."""
        bits = max(weight.bits for weight in self._weights.values())
        return self.method, self.budget if self.method == MIXED_METHOD else bits

    def packed_weights(self, state: Mapping[str, Tensor] | None = None) -> dict[str, QuantizedWeight]:
        """Return codes and trained scales by layer.

        Args:
            state: State dict of a checkpoint of this module, to take the gains from; None takes its own.

        Raises:
            UserError: If the packed file, which has the codes, is gone.
        """
        if not self._weights:
            raise UserError(f"{self.packed} is gone, and the codes of this network are in it: put it back")
        state = self.state_dict() if state is None else state
        return {
            name: replace(weight, scale=state[f"gains.{i}"].detach().cpu() * weight.scale)
            for i, (name, weight) in enumerate(self._weights.items())
        }
