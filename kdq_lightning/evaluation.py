"""What is measured of a classifier: accuracy, calibration and agreement, exact over all ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from kdq_lightning.data.normalization import Statistics, normalize
from kdq_lightning.errors import UserError

BINS = 15
BATCH = {"cpu": 128, "cuda": 2048}  # images that fill the device; more leave a processor's cache


def build_metrics(num_classes: int) -> MetricCollection:
    """Return top-1, top-5 and expected calibration error (15 bins), shares in [0, 1].

    They take probabilities (batch, classes) and labels (batch,). With fewer than 6 classes top-5 is 1.

    Source of the calibration error: Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3.
    """
    return MetricCollection(
        {
            "top1": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(num_classes, min(5, num_classes), average="micro", validate_args=False),
            "ece": MulticlassCalibrationError(num_classes, n_bins=BINS, validate_args=False),
        },
        compute_groups=False,
    )


@dataclass(frozen=True)
class Split:
    """Images to evaluate on.

    Attributes:
        images: uint8, (images, 3, h, w), in canonical order.
        labels: int64, (images,).
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a split; on every rank the same, whatever their number.

    Attributes:
        classes: int64, (images,), predicted classes in the split's order.
        correct: bool, (images,).
        top1: Percent.
        top5: Percent.
        nll: Mean cross-entropy, nats.
        ece: Expected calibration error over 15 bins, percent.
    """

    classes: Tensor
    correct: Tensor
    top1: float
    top5: float
    nll: float
    ece: float


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
    network.eval()
    device = next(network.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    measured = [torch.empty(0, 4, dtype=torch.float64, device=device)]
    with full_float32(device):
        share = torch.arange(rank, len(split.labels), world_size)
        for index in torch.split(share, BATCH.get(device.type, BATCH["cpu"])):
            images = normalize(split.images[index].to(device), statistics)
            logits = network(images.contiguous(memory_format=torch.channels_last))
            measured.append(_measure(logits.double(), split.labels[index].to(device)))
            progress(len(index))
    classes, hits5, nll, confidence = _gather(torch.cat(measured), len(split.labels)).cpu().mT.contiguous()
    if not bool(nll.isfinite().all()):
        raise UserError("the network's outputs are not finite on some images: check its weights")
    correct = classes.long() == split.labels
    return Evaluation(
        classes=classes.long(),
        correct=correct,
        top1=percent(correct),
        top5=percent(hits5),
        nll=float(nll.mean()),
        ece=calibration_error(confidence, correct),
    )


def _measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Return of each image its class, whether the label is among the five likeliest, its loss and its confidence."""
    confidence, classes = logits.softmax(1).max(1)
    hits5 = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return torch.stack([classes.double(), hits5.double(), nll, confidence], 1)


def _gather(share: Tensor, total: int) -> Tensor:
    """Put the shares of all ranks, (about total / ranks, values), back into the order of the images."""
    if not dist.is_initialized():
        return share
    world_size = dist.get_world_size()
    padded = F.pad(share, (0, 0, 0, -(-total // world_size) - len(share)))
    shares = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(shares, padded)
    return torch.stack(shares, 1).flatten(0, 1)[:total]


def percent(hits: Tensor) -> float:
    """Return the mean of bools or numbers (images,) in percent."""
    return 100 * float(hits.double().mean())


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the expected calibration error in percent: Σ_bins |hits - Σ confidence| / images.

    Source: Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3, with 15 bins of equal width.

    Args:
        confidence: float64, (images,), probabilities of the predicted classes.
        correct: bool, (images,).
    """
    bins = torch.bucketize(confidence, torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, correct.double() - confidence)
    return 100 * float(gaps.abs().sum()) / len(confidence)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 proper: no autocast around, and no TensorFloat-32 in convolutions on a GPU."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
