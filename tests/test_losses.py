"""Losses against printed float64 values, slow references and the errors that public code is known for."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdq_lightning.losses import cross_entropy, dkd_loss, dkd_parts, hint_loss, kd_loss, mixup, mutual_loss, partner

STUDENT = torch.tensor([[1, 2, 0.5, -1], [0, -0.5, 3, 1]], dtype=torch.float64)
TEACHER = torch.tensor([[2, 1, -0.5, 0], [-1, 0.5, 2.5, 1.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def close(value: Tensor | float, expected: float) -> bool:
    return abs(float(value) - expected) < 5e-11


def random_logits(
    batch: int = 64, classes: int = 10, spread: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, batch, classes, dtype=torch.float64, generator=generator)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def slow_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))


def slow_kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    rows = [
        slow_kl(softmax(t.numpy() / temperature), softmax(s.numpy() / temperature))
        for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def slow_dkd_parts(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> list[tuple[float, float]]:
    parts = []
    for s, t, label in zip(student.numpy(), teacher.numpy(), labels.tolist(), strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        binary = [np.array([p[label], 1 - p[label]]) for p in (p_t, p_s)]
        others = [np.delete(p, label) / np.delete(p, label).sum() for p in (p_t, p_s)]
        parts.append((slow_kl(*binary), slow_kl(*others)))
    return parts


def test_printed_values():
    ce, kd = cross_entropy(STUDENT, LABELS), kd_loss(STUDENT, TEACHER, 4)
    dkd = dkd_loss(STUDENT, TEACHER, LABELS, alpha=1, beta=8, temperature=4)
    assert close(kd, 0.3790206061)
    assert close(kd_loss(STUDENT, TEACHER, math.inf), 0.40625)
    assert close(dkd, 2.9759975729)
    assert close(ce, 0.8450945483)
    assert close(0.1 * ce + 0.9 * kd, 0.4256280003)
    assert close(ce + dkd, 3.8210921213)
    first, second = mutual_loss([STUDENT, TEACHER], LABELS)
    assert close(first, 1.1434435912)
    assert close(second, 0.7245505040)
    tckd, nckd = dkd_parts(STUDENT, TEACHER, LABELS, 4)
    for values, expected in ((tckd, (0.014550156728, 0.004052259629)), (nckd, (0.025216880782, 0.018957779250))):
        assert all(abs(float(v) - e) < 1e-12 for v, e in zip(values, expected, strict=True))


def test_kd_gradient():
    """The gradient is (τ/N)(softmax(z_S/τ) - softmax(z_T/τ)); the printed row has been computed apart."""
    student = STUDENT.clone().requires_grad_()
    kd_loss(student, TEACHER, 4).backward()
    expected = 4 / 2 * (torch.softmax(STUDENT / 4, 1) - torch.softmax(TEACHER / 4, 1))
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-14)
    printed = torch.tensor([-0.154717748242, 0.147312502531, 0.101246303621, -0.093841057910], dtype=torch.float64)
    torch.testing.assert_close(student.grad[0], printed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_slow_references(temperature: float, classes: int):
    student, teacher, labels = random_logits(16, classes)
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(
        slow_kd(student, teacher, temperature), rel=1e-10
    )
    tckd, nckd = dkd_parts(student, teacher, labels, temperature)
    for i, (slow_t, slow_n) in enumerate(slow_dkd_parts(student, teacher, labels, temperature)):
        assert float(tckd[i]) == pytest.approx(slow_t, rel=1e-8, abs=1e-12)
        assert float(nckd[i]) == pytest.approx(slow_n, rel=1e-8, abs=1e-12)
    loss = dkd_loss(student, teacher, labels, 1.5, 6.0, temperature)
    slow = sum(1.5 * t + 6.0 * n for t, n in slow_dkd_parts(student, teacher, labels, temperature)) / len(labels)
    assert float(loss) == pytest.approx(temperature**2 * slow, rel=1e-9)


def test_logit_matching_is_the_limit():
    student, teacher, _ = random_logits()
    limit = float(kd_loss(student, teacher, math.inf))
    assert float(kd_loss(student, teacher, 1e4)) == pytest.approx(limit, rel=1e-3)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert limit == pytest.approx(float(centred.square().sum(1).mean() / 20), rel=1e-12)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e3])
def test_dkd_identity(spread: float):
    """KL(p_T ‖ p_S) = TCKD + (1 - p_t)·NCKD, absolutely for moderate logits and relatively beyond."""
    student, teacher, labels = random_logits(spread=spread)
    tckd, nckd = dkd_parts(student, teacher, labels, 1.0)
    whole = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True).sum(1)
    others = teacher.softmax(1).scatter(1, labels[:, None], 0.0).sum(1)  # 1 - p_t without its cancellation
    error = (tckd + others * nckd - whole).abs()
    assert bool((error < 1e-12 * whole.clamp(min=1)).all())


def test_dkd_extremes():
    """One-hot teachers and logits of ±1000 stay finite, forward and backward."""
    student = torch.tensor([[1e3, -1e3, 0.0], [-1e3, 1e3, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e3, 1e3, 0.0], [1e3, -1e3, 0.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0, 0]), 1.0, 8.0, 4.0)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    one_hot = torch.full((2, 5), -1e3).scatter(1, torch.tensor([[1], [2]]), 1e3)
    tckd, nckd = dkd_parts(torch.zeros(2, 5), one_hot, torch.tensor([1, 2]), 1.0)
    torch.testing.assert_close(tckd, torch.full((2,), math.log(5)))
    torch.testing.assert_close(nckd, torch.zeros(2), atol=1e-6, rtol=0)


def test_half_precision_is_computed_in_float32():
    """Near distributions: bfloat16 arithmetic gets the divergence wrong, even its sign."""
    student, teacher, labels = random_logits(256, 10, spread=1.0)
    student = teacher + 0.02 * student
    rounded = student.bfloat16(), teacher.bfloat16()
    exact = rounded[0].double(), rounded[1].double()
    for value, reference in (
        (kd_loss(*rounded, 4), kd_loss(*exact, 4)),
        (dkd_loss(*rounded, labels, 1, 8, 4), dkd_loss(*exact, labels, 1, 8, 4)),
        (mutual_loss(rounded, labels)[0], mutual_loss(exact, labels)[0]),
        (kd_loss(*rounded, math.inf), kd_loss(*exact, math.inf)),
        (hint_loss(*rounded), hint_loss(*exact)),
    ):
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(reference), rel=1e-3)


@pytest.mark.parametrize("peers", [2, 3, 5])
def test_mutual_learning(peers: int):
    """Each peer's loss is CE plus the mean over pairs, and no gradient flows through another's prediction."""
    _, _, labels = random_logits(8, 4)
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(8, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(peers)]
    losses = mutual_loss(logits, labels)
    for i, loss in enumerate(losses):
        pairs = [slow_kd(logits[i].detach(), other.detach(), 1.0) for j, other in enumerate(logits) if j != i]
        ce = float(F.cross_entropy(logits[i].detach(), labels))
        assert float(loss.detach()) == pytest.approx(ce + sum(pairs) / len(pairs), rel=1e-10)
        gradients = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
        for j, gradient in enumerate(gradients):
            assert (gradient is not None and gradient.abs().sum() > 0) if i == j else gradient is None


def test_hint_loss():
    assert float(hint_loss(torch.full((2, 3, 4, 4), 1.5), torch.ones(2, 3, 4, 4))) == 0.125


@pytest.mark.parametrize(("batch", "expected"), [(4, [1, 0, 3, 2]), (5, [1, 0, 3, 2, 4]), (1, [0])])
def test_partner(batch: int, expected: list[int]):
    assert partner(torch.arange(batch)).tolist() == expected


def test_mixup():
    images = torch.arange(6.0).reshape(3, 1, 1, 2)
    mixed = mixup(images, 0.25)
    for g, other in enumerate((1, 0, 2)):
        torch.testing.assert_close(mixed[g], 0.25 * images[g] + 0.75 * images[other])
    assert torch.equal(mixup(images, 1.0), images)
    with pytest.raises(ValueError, match="lam"):
        mixup(images, 1.5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_bad_temperature(temperature: float):
    with pytest.raises(ValueError, match="temperature"):
        kd_loss(STUDENT, TEACHER, temperature)
    with pytest.raises(ValueError, match="temperature"):
        dkd_parts(STUDENT, TEACHER, LABELS, temperature)


def test_too_few_peers():
    with pytest.raises(ValueError, match="2 peers"):
        mutual_loss([STUDENT], LABELS)
