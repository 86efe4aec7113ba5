"""Distillation losses as functions of logits.

Half-precision logits are converted to float32 first; float64 stays float64.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _exact(logits: Tensor) -> Tensor:
    """Cast half precision to float32: a divergence of two near distributions drowns in bfloat16."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, mean over the batch.

    Args:
        logits: (batch, classes).
        labels: (batch,), class indices.
    """
    return F.cross_entropy(_exact(logits), labels)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Softened Kullback-Leibler divergence τ²·KL(p_T^τ ‖ p_S^τ), mean over the batch.

    Its limit for τ -> inf (`temperature=math.inf`) is logit matching, ‖(z_S - z̄_S) - (z_T - z̄_T)‖² / 2C.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        temperature: τ > 0, or inf.

    Raises:
        ValueError: If the temperature is not above 0.

    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, section 2 and 2.1; the limit: Bucila et
    al. 2006, Model Compression, and Ba & Caruana 2014, Do Deep Nets Really Need to be Deep?, eq. 2.
    """
    _check_temperature(temperature)
    student, teacher = _exact(student_logits), _exact(teacher_logits)
    if math.isinf(temperature):
        centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
        return centred.square().mean() / 2
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _split_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p_t and log(1 - p_t), each (batch,), and the log-probabilities among the others, (batch, C - 1)."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, columns + (columns >= labels[:, None]))
    target = logits.gather(1, labels[:, None]).squeeze(1)
    margin = target - others.logsumexp(1)
    return F.logsigmoid(margin), F.logsigmoid(-margin), others.log_softmax(1)


def dkd_parts(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Split the softened KL divergence into its target-class and its non-target-class part, without τ².

    With p_t the probability of the label: KL(p_T ‖ p_S) = TCKD + (1 - p_t^T)·NCKD.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        labels: (batch,), class indices.
        temperature: τ > 0, finite.

    Returns:
        TCKD = KL((p_t, 1 - p_t)_T ‖ (p_t, 1 - p_t)_S) and NCKD = KL(p̂_T ‖ p̂_S) over the non-target classes
        renormalised, each (batch,).

    Raises:
        ValueError: If the temperature is not above 0 or not finite.

    Source: Zhao et al. 2022, Decoupled Knowledge Distillation, eq. 2 to 5.
    """
    _check_temperature(temperature)
    if math.isinf(temperature):
        raise ValueError("decoupled distillation needs a finite temperature")
    log_s, log_not_s, others_s = _split_target(_exact(student_logits) / temperature, labels)
    log_t, log_not_t, others_t = _split_target(_exact(teacher_logits) / temperature, labels)
    tckd = log_t.exp() * (log_t - log_s) + log_not_t.exp() * (log_not_t - log_not_s)
    nckd = (others_t.exp() * (others_t - others_s)).sum(1)
    return tckd, nckd


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Decoupled distillation τ²·(α·TCKD + β·NCKD), mean over the batch.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        labels: (batch,), class indices.
        alpha: Weight of the target-class part.
        beta: Weight of the non-target-class part; it belongs to the pair of networks.
        temperature: τ > 0, finite.

    Raises:
        ValueError: If the temperature is not above 0 or not finite.

    Source: Zhao et al. 2022, Decoupled Knowledge Distillation, eq. 7.
    """
    tckd, nckd = dkd_parts(student_logits, teacher_logits, labels, temperature)
    return temperature**2 * (alpha * tckd + beta * nckd).mean()


def mutual_loss(logits: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """Loss of each of K peers: CE_i + 1/(K-1)·Σ_{j≠i} KL(p_j ‖ p_i), the other peers' predictions taken as constants.

    The peers step together; the paper's loop updates them one after another.

    Args:
        logits: K >= 2 tensors (batch, classes).
        labels: (batch,), class indices.

    Returns:
        K scalars, means over the batch.

    Raises:
        ValueError: If there are fewer than two peers.

    Source: Zhang et al. 2017, Deep Mutual Learning, eq. 4 to 9.
    """
    if len(logits) < 2:
        raise ValueError(f"mutual learning needs at least 2 peers, got {len(logits)}")
    losses = []
    for i, own in enumerate(logits):
        others = [kd_loss(own, other.detach(), temperature=1.0) for j, other in enumerate(logits) if j != i]
        losses.append(cross_entropy(own, labels) + torch.stack(others).mean())
    return losses


def hint_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Half the squared distance between features, ½·mean over batch, channels and positions.

    Args:
        student_features: (batch, channels, h, w), already mapped to the teacher's channels.
        teacher_features: (batch, channels, h, w).

    Source: Romero et al. 2015, FitNets: Hints for Thin Deep Nets, eq. 3.
    """
    return F.mse_loss(_exact(student_features), _exact(teacher_features)) / 2


def partner(values: Tensor) -> Tensor:
    """Return for each position g of the batch what stands at g XOR 1; the last of an odd batch is its own partner.

    Args:
        values: (batch, ...).
    """
    positions = torch.arange(len(values), device=values.device)
    return values[(positions ^ 1).where((positions ^ 1) < len(values), positions)]


def mixup(images: Tensor, lam: float) -> Tensor:
    """Mix each image with its `partner`: λx + (1 - λ)x_π.

    Args:
        images: (batch, channels, h, w).
        lam: λ in [0, 1]; 1 leaves the images as they are.

    Raises:
        ValueError: If λ is outside [0, 1].

    Source: Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, eq. 1.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be within [0, 1], got {lam}")
    return torch.lerp(partner(images), images, lam)
