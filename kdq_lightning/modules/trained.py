"""Base class of every strategy: optimizer, steps and epochs of a training. What is trained is in classifier.py."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdq_lightning.data.augmentation import View
from kdq_lightning.errors import UserError
from kdq_lightning.modules.evaluated import EvaluatedModule
from kdq_lightning.modules.optimization import Cycles, GivenOptimizer, configure_optimizer, muon_kernels
from kdq_lightning.modules.schedule import one_cycle
from kdq_lightning.modules.training_epoch import TrainingEpoch, epoch_line
from kdq_lightning.networks import NETWORKS
from kdq_lightning.random_draws import random_integers

CHECK_EVERY = 50  # steps between two looks at the loss: each look makes the host wait for the device


class Losses(NamedTuple):
    """The result of a training step: the loss to minimise, its named parts, and logits (..., batch, classes) if any."""

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor | None


class TrainedModule(EvaluatedModule):
    """Networks that are trained; a subclass builds them and says what they minimise.

    Attributes:
        optimizer: None is SGD; `muon` is Muon for the convolutions' kernels.
        given_optimizer: What trains instead, if the user names it; see `use_optimizer`.
        learning_rate: Peak of the schedule.
        kernel_learning_rate: That of Muon's kernels.
        weight_decay: L2 penalty on matrices and kernels.
        warmup: Share of the steps in which the learning rate rises.
    """

    given_optimizer: GivenOptimizer | None = None
    optimizer: str | None
    learning_rate: float
    kernel_learning_rate: float
    weight_decay: float
    warmup: float

    def __init__(self) -> None:
        """Start without an epoch's sums."""
        super().__init__()
        self._epoch = TrainingEpoch(self.device)

    def network_names(self) -> dict[str, str]:
        """Return the name that each of `networks()` was built by."""
        raise NotImplementedError

    def losses(self, view: View) -> Losses:
        """Return the loss of a training batch, its named parts and the logits; see `Classifier.losses`."""
        raise NotImplementedError

    # --- optimizer

    def use_optimizer(self, optimizer: Mapping[str, Any], lr_scheduler: Mapping[str, Any] | None) -> None:
        """Train with another optimizer and schedule, in place of `optimizer`, `learning_rate` and what belongs to them.

        Args:
            optimizer: `class_path` and `init_args`.
            lr_scheduler: Likewise; None for a constant learning rate.

        Raises:
            UserError: If the module's own option names an optimizer, too.
        """
        if self.optimizer is not None:
            raise UserError("--optimizer and --model.init_args.optimizer are both given: leave one of them out")
        self.given_optimizer = GivenOptimizer(optimizer, lr_scheduler)

    @property
    def optimizer_text(self) -> str:
        """What trains the network: `sgd`, `muon`, or the user's class with its arguments."""
        return self.given_optimizer.optimizer_text if self.given_optimizer else self.optimizer or "sgd"

    def _total_steps(self) -> int:
        """Return the number of optimizer steps of the training."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("the learning rate needs an end: give --trainer.max_epochs or --trainer.max_steps")
        return int(total)

    def configure_optimizers(self) -> Any:  # noqa: ANN401 - one of Lightning's forms
        """Return the optimizer that the user gives; else the one under `cycles`, per step: SGD, or Muon.

        Muon's learning rate has no warm-up.
        """
        if self.given_optimizer is not None:
            return self.given_optimizer.configure(self.parameters())
        total = self._total_steps()
        use_muon = self.optimizer == "muon"
        return configure_optimizer(
            self.cycles(total, self.warmup),
            self.cycles(total, warmup=0),
            muon_kernels(self.networks().values(), str(self.trainer.precision)) if use_muon else set(),
            self.learning_rate,
            self.kernel_learning_rate,
            self.weight_decay,
        )

    def cycles(self, total: int, warmup: float) -> Cycles:
        """Return groups of modules, each with its learning rate over the steps.

        Args:
            total: Number of steps.
            warmup: Share of the steps in which the rate rises.

        Returns:
            Pairs of modules and their learning rate as a share of the peak.
        """
        return [(list(self.networks().values()), one_cycle(total, warmup))]

    # --- steps and epochs

    def logged_names(self) -> list[str]:
        """Return what `fit` logs in every epoch; the parts of a loss are known once it has been taken."""
        of_training = self._epoch.names or ("loss", "top1")
        return [*super().logged_names(), *(f"train/{name}" for name in of_training), "lr"]

    def on_train_start(self) -> None:
        """Start the epoch's sums: Lightning skips `on_train_epoch_start` when it resumes within an epoch."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Start the epoch's sums and its clock."""
        self._epoch = TrainingEpoch(self.device)

    def on_validation_start(self) -> None:
        """Stop the clock of the epoch's training."""
        self._epoch.stop_clock()

    def on_validation_end(self) -> None:
        """Start the clock again."""
        self._epoch.resume_clock()

    def training_step(self, batch: View, batch_idx: int) -> Tensor:
        """Return the strategy's loss; its parts are summed on the device and logged once an epoch."""
        self._seed_draws(batch_idx)
        losses = self.losses(batch)
        self.validation_scores = {}
        with torch.no_grad():
            values = {"loss": losses.loss, **losses.parts}
            if losses.logits is not None:
                values["top1"] = 100 * (losses.logits.argmax(-1) == batch.labels).float().mean()
            self._epoch.add(values, len(batch.labels), self.global_step)
        if batch_idx % CHECK_EVERY == 0:
            self._refuse_nan()
        return losses.loss

    def _seed_draws(self, batch_idx: int) -> None:
        """Let what a network draws in a step, such as dropout, depend on seed, epoch, batch and rank alone.

        A run that goes on within an epoch then draws what the unbroken run does. Networks that draw nothing are spared.
        """
        if all(name in NETWORKS for name in self.network_names().values()):
            return
        seed = getattr(self.trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
        torch.manual_seed(int(random_integers(seed, self.current_epoch, batch_idx, self.global_rank)))

    def _refuse_nan(self) -> None:
        """Stop on every rank if a loss was not finite on any rank, before such weights are saved."""
        if not self.trainer.training:
            return
        if (step := self._epoch.bad_step(self.trainer.strategy)) >= 0:
            saved = [getattr(keeper, "best_model_path", "") for keeper in self.trainer.checkpoint_callbacks]
            good = next(filter(None, reversed(saved)), "")
            raise UserError(
                f"the loss has not been finite since step {step}; last good checkpoint: {good or 'none yet'}. Lower"
                " --model.init_args.learning_rate or look at the data, and "
                + (f"start from its weights with --model.init_args.weights {good}" if good else "start again")
            )

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means over all images of all ranks."""
        self._refuse_nan()
        means = self._epoch.means(self.trainer.strategy)
        if not means:  # resumed where the epoch's last step was done
            return
        logs = {f"train/{name}": mean for name, mean in means.items()}
        logs["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(logs | {"step": float(self.global_step)})
        self._print_epoch({**logs, **self.trainer.callback_metrics})

    def _print_epoch(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Print a line for the epoch, which stays in the log when there is no progress bar."""
        numbers = {name: float(metrics[name]) for name in metrics}
        self.print(epoch_line(self.current_epoch + 1, self.trainer.max_epochs, numbers), flush=True)
