"""A solver and a codebook from outside the package: an entry of a table each, and everything else follows."""

import pytest
import torch
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.quantization import load_packed, quantize
from kdq_lightning.quantization.codebooks import CODEBOOKS, Alphabet, Codebook
from kdq_lightning.quantization.gram import Gram
from kdq_lightning.quantization.packing import read_weights
from kdq_lightning.quantization.solvers import SOLVERS, Recursion, Solver


def powers_of_two(half: int) -> Tensor:
    """Sums become shifts: 0 and ±2^k."""
    positive = 2.0 ** torch.arange(half - 1)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def round_to_nearest(alphabet: Alphabet, values: Tensor, noise: Tensor | float, out: Tensor | None) -> Tensor:
    grid = alphabet.grid.to(values)
    levels = grid[torch.bucketize(values.contiguous(), (grid[1:] + grid[:-1]) / 2)]
    return levels if out is None else out.copy_(levels)


def ridge(gram: Gram, weight: Tensor) -> Recursion:
    """The weights of a ridge regression, each rounded by itself; reads B, so that the engine must gather it."""
    penalty = 0.1 * gram.A.diagonal(dim1=1, dim2=2).mean() * torch.eye(gram.A.shape[1], dtype=torch.float64)
    return Recursion(torch.linalg.solve(gram.A + penalty, (gram.B + penalty) @ weight), None)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODEBOOKS, "shifts", Codebook(powers_of_two, round_to_nearest))
    monkeypatch.setitem(SOLVERS, "ridge", Solver(ridge, needs_cross=True))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5))


@pytest.mark.parametrize("scale", ["channel", "layer"])
def test_a_solver_and_a_codebook_from_outside(tables, tmp_path, scale):
    network, images = small_network().eval(), torch.randn(64, 3, 8, 8)
    result = quantize(network, [images], bits=(3, 4), solver="ridge", codebook="shifts", scale=scale)[3]
    assert {(layer.codebook, layer.levels) for layer in result.layers} == {("shifts", 7)}
    solvers = {layer.name: layer.solver for layer in result.layers if not layer.note}
    assert solvers and set(solvers.values()) == {"ridge"}, "a layer that is rounded instead says so in its note"
    result.save(tmp_path / "shifts.safetensors")
    with torch.no_grad():
        found = load_packed(tmp_path / "shifts.safetensors", small_network().eval())(images)
        assert torch.equal(found, result.model(images))
        assert (found - network(images)).norm() < 0.6 * network(images).norm()
    weight = read_weights(tmp_path / "shifts.safetensors")["2"]
    assert weight.grid.tolist() == [-4, -2, -1, 0, 1, 2, 4] and torch.equal(weight.codes, result.weights["2"].codes)


def test_a_file_of_a_codebook_that_is_gone_is_refused(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODEBOOKS, "shifts", Codebook(powers_of_two, round_to_nearest))
        result = quantize(small_network(), [torch.randn(64, 3, 8, 8)], bits=(3,), codebook="shifts")[3]
        result.save(tmp_path / "shifts.safetensors")
    with pytest.raises(UserError, match="unknown codebook 'shifts'"):
        load_packed(tmp_path / "shifts.safetensors", small_network())
