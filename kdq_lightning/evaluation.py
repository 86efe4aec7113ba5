"""Computes accuracy, loss and calibration of a network. All code uses this.

With several processes the result is the same as with one.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities import dim_zero_cat

from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError

BINS = 15
BATCH = {"cpu": 128, "cuda": 2048}  # images that fill the device; more leave a processor's cache


@dataclass(frozen=True)
class Split:
    """Images to evaluate on.

    Attributes:
        images: uint8, (images, channels, h, w), in canonical order.
        labels: int64, (images,).
    """

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> "Split":
        """Return some of the images."""
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Evaluation:
    """How a network classifies the images of a split; the same on every rank, whatever their number.

    Attributes:
        classes: int64, (images,), predicted classes in the split's order.
        correct: bool, (images,), whether they are the labels.
        top1: Percent.
        top5: Percent; 100 with fewer than 6 classes.
        nll: Mean cross-entropy, nats.
        ece: Expected calibration error over 15 bins of equal width, percent (Guo et al. 2017, On Calibration of Modern
            Neural Networks, eq. 3).
    """

    classes: Tensor
    correct: Tensor
    top1: float
    top5: float
    nll: float
    ece: float


class Evaluator(Metric):
    """Collects a network's answers image by image, and computes the evaluation of all ranks' images together.

    Every rank calls `update` at least once, if need be with an empty batch, and then `evaluation`.
    """

    full_state_update = False
    answers: list[Tensor]

    def __init__(self) -> None:
        """Start without images."""
        super().__init__()
        self.add_state("answers", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Add a batch.

        Args:
            logits: (batch, classes); everything is computed from them in float64.
            labels: int64, (batch,).
            index: int64, (batch,), place of each image in the split.
        """
        logits = logits.double()
        confidence, classes = logits.softmax(1).max(1)
        is_among_5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
        nll = F.cross_entropy(logits, labels, reduction="none")
        columns = (index, classes, classes == labels, is_among_5, nll, confidence)
        self.answers.append(torch.stack([column.double() for column in columns], 1))

    def compute(self) -> Tensor:
        """Return the answers of all ranks, float64, (images, 6), in the order of the images' index."""
        answers = dim_zero_cat(self.answers)
        return answers[answers[:, 0].argsort()]

    def evaluation(self) -> Evaluation:
        """Return the evaluation of all ranks' images; its vectors are on the CPU, in the order of the index."""
        _, classes, correct, top5, nll, confidence = self.compute().cpu().mT.contiguous()
        return Evaluation(
            classes=classes.long(),
            correct=correct.bool(),
            top1=percent(correct),
            top5=percent(top5),
            nll=float(nll.mean()),
            ece=_calibration_error(confidence, correct),
        )


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the expected calibration error in percent, NaN if a confidence is.

    Args:
        confidence: float64, (images,), probabilities of the predicted classes.
        correct: float64, (images,), 1 where the prediction is right.
    """
    if not bool(confidence.isfinite().all()):
        return float("nan")
    # A confidence of exactly 1 would have a bin of its own in torchmetrics.
    below_one = confidence.clamp(max=1 - torch.finfo(torch.float64).eps)
    return 100 * float(binary_calibration_error(below_one, correct.long(), n_bins=BINS, norm="l1"))


@torch.no_grad()
def evaluate(
    network: nn.Module,
    split: Split,
    statistics: Statistics,
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Evaluate a network on each image of a split once, in float32; ranks take every world-size-th image.

    Args:
        network: On the device to compute on; it is put into eval mode, nothing else of it changes.
        split: The images.
        statistics: Those of the inputs that the network expects.
        progress: Called with the number of images that were done since the last call.

    Raises:
        UserError: If an output is not finite.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(network.parameters()).device
    share = torch.arange(rank, len(split.labels), world_size)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in torch.split(share, BATCH.get(device.type, BATCH["cpu"])):
            images = normalize(split.images[index].to(device), statistics)
            yield images.contiguous(memory_format=torch.channels_last), split.labels[index], index

    return evaluate_batches(network, batches(), progress)


@torch.no_grad()
def evaluate_batches(
    network: nn.Module,
    batches: Iterable[tuple[Any, Tensor, Tensor]],
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Evaluate a network on batches, each image once over all ranks, in float32.

    Args:
        network: On the device to compute on; it is put into eval mode, nothing else of it changes.
        batches: Inputs on the device, their labels (batch,) and their places among all images (batch,).
        progress: Called with the number of images that were done since the last call.

    Raises:
        UserError: If an output is not finite.
    """
    network.eval()
    device = next(network.parameters()).device
    evaluator = Evaluator().to(device)
    with full_float32(device):
        for inputs, labels, index in batches:
            evaluator.update(network(inputs), labels.to(device), index.to(device))
            progress(len(index))
    evaluation = evaluator.evaluation()
    if not math.isfinite(evaluation.nll):
        raise UserError("the network's outputs are not finite on some images: check its weights")
    return evaluation


def percent(hits: Tensor) -> float:
    """Return the mean of bools or numbers (images,) in percent."""
    return 100 * float(hits.double().mean())


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast around, and no TensorFloat-32 in convolutions on a GPU."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
