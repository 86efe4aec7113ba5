"""Networks with a bit width of its own for each layer, within a budget of bytes."""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed, quantize
from kdq_lightning.quantization.mixed import Files, candidate_recipes
from kdq_lightning.quantization.packing import metadata_bytes

IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
METADATA = {"network": "resnet8", "method": "mixed", "mean": "[0.5, 0.5, 0.5]", "name": 'quoted "é"'}


def resnet8() -> nn.Module:
    """Return an untrained network."""
    torch.manual_seed(0)
    return build_network("resnet8", 10).eval()


class LoudAndQuiet(nn.Module):
    """Two layers of one size: one decides the outputs, the other hardly moves them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.quiet = nn.Conv2d(3, 24, 3)
        self.loud = nn.Conv2d(3, 24, 3)
        self.head = nn.Linear(24, 4)

    def forward(self, images: Tensor) -> Tensor:
        quiet, loud = (F.relu(layer(images)).mean((2, 3)) for layer in (self.quiet, self.loud))
        return self.head(0.05 * quiet + 10 * loud)


def test_files_fit(tmp_path):
    """Each file is within its budget and close to it, loads to the bit, and says what its layers have."""
    network = resnet8()
    budgets = (16_000, 40_000)
    result = quantize(network, [IMAGES], (4,), budgets=budgets)
    assert list(result) == [4]
    assert list(result.mixed) == list(budgets)
    means = []
    for budget, mixed in result.mixed.items():
        path = tmp_path / f"{budget}.safetensors"
        mixed.save(path)
        assert budget - 100 < path.stat().st_size <= budget
        assert path.stat().st_size == mixed.file_bytes()
        loaded = load_packed(path, resnet8())
        assert torch.equal(loaded(IMAGES[:8]), mixed.model(IMAGES[:8]))
        assert [layer.name for layer in mixed.layers] == [layer.name for layer in result[4].layers]
        assert {weight.bits for weight in mixed.weights.values()} != {mixed.weights["conv1"].bits} or budget == 40_000
        means.append(sum(weight.grid.numel() for weight in mixed.weights.values()))
    assert means == sorted(means)


def test_what_decides_gets_the_bits():
    """Of two layers of one size the one that moves the outputs more has more levels."""
    (mixed,) = quantize(LoudAndQuiet(), [IMAGES], (), budgets=(1_500,)).mixed.values()
    assert len(mixed.weights["loud"].grid) > len(mixed.weights["quiet"].grid)


def test_metadata_fit(tmp_path):
    """What is left for metadata is enough; without it the file is refused instead of being too large."""
    reserved = metadata_bytes(METADATA)
    results = [quantize(LoudAndQuiet(), [IMAGES], (), budgets=(1_500,), metadata_bytes=n) for n in (reserved, 0)]
    fitting, too_large = (result.mixed[1_500] for result in results)
    fitting.save(tmp_path / "a.safetensors", METADATA)
    assert (tmp_path / "a.safetensors").stat().st_size <= 1_500
    with pytest.raises(UserError, match="more than its budget of 1,500: quantize with metadata_bytes"):
        too_large.save(tmp_path / "b.safetensors", METADATA)
    assert not (tmp_path / "b.safetensors").exists()


def ten_random_budgets_are_kept(seed: int) -> None:
    """By whole files."""
    draw = random.Random(seed)
    smallest = 1_100
    budgets = tuple(draw.sample(range(smallest, 2_300), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixed = quantize(LoudAndQuiet(), [IMAGES[:16]], (), budgets=budgets, solver="rounding", refine=0).mixed
    for budget in budgets:
        assert mixed[budget].file_bytes() <= budget


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_never_above_the_budget(seed):
    ten_random_budgets_are_kept(seed)


@pytest.mark.slow(seconds=12)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_never_above_two_hundred_budgets(seed):
    ten_random_budgets_are_kept(seed)


def test_the_smallest_possible_size_is_named():
    """And is possible."""
    network = LoudAndQuiet()
    with pytest.raises(UserError, match="too small for this network") as refused:
        quantize(network, [IMAGES], (), budgets=(500,), metadata_bytes=50)
    smallest = int(str(refused.value).split()[-2].replace(",", ""))
    (mixed,) = quantize(network, [IMAGES], (), budgets=(smallest,), metadata_bytes=50).mixed.values()
    assert {len(weight.grid) for weight in mixed.weights.values()} == {2}
    assert smallest - 60 <= mixed.file_bytes() <= smallest - 50
    with pytest.raises(UserError, match="too small"):
        quantize(network, [IMAGES], (), budgets=(smallest - 1,), metadata_bytes=50)


def test_more_than_enough_gives_8_bits():
    """And says so."""
    with pytest.warns(UserWarning, match="8 bits for every layer take: these are given"):
        result = quantize(LoudAndQuiet(), [IMAGES], (8,), budgets=(10**6,))
    mixed = result.mixed[10**6]
    assert {weight.bits for weight in mixed.weights.values()} == {8}
    for key, value in mixed.model.state_dict().items():
        assert torch.equal(value, result[8].model.state_dict()[key])


@pytest.mark.parametrize("budgets", [(0,), (-5,), (True,), (2.5e4,), ("50kB",)])
def test_not_a_number_of_bytes(budgets):
    with pytest.raises(UserError, match="a budget is a number of bytes"):
        quantize(LoudAndQuiet(), [IMAGES], (), budgets=budgets)


def test_neither_bits_nor_budgets():
    with pytest.raises(UserError, match="no bit width"):
        quantize(LoudAndQuiet(), [IMAGES], ())
    with pytest.raises(UserError, match="each budget stands once"):
        quantize(LoudAndQuiet(), [IMAGES], (), budgets=(1_500, 1_500))


def test_shared_weights_count_once():
    """Layers that share a weight get one bit width, and take the bytes of one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    network[2].weight = network[0].weight
    (mixed,) = quantize(network, [torch.randn(96, 16)], (), budgets=(850,)).mixed.values()
    assert mixed.weights["0"] is mixed.weights["2"]
    assert mixed.file_bytes() <= 850


@pytest.mark.parametrize("options", [{"codebook": "narrow"}, {"mode": "official"}, {"scale": "layer"}])
def test_with_other_options(options):
    """A codebook that has no level at 1 bit, the published recursion, a scale a layer."""
    (mixed,) = quantize(LoudAndQuiet(), [IMAGES], (), budgets=(1_600,), **options).mixed.values()
    assert mixed.file_bytes() <= 1_600
    if "codebook" in options:
        assert {weight.codebook for weight in mixed.weights.values()} == {"narrow"}


def test_sizes_are_those_of_files():
    """Known before anything is solved, for a uniform choice and the network that is made by it."""
    network = resnet8()
    recipes = candidate_recipes(None)
    assert [len(recipe.alphabet.grid) for recipe in recipes] == [2, 3, 4, 5, 8, 9, 16, 32, 64, 128, 256]
    result = quantize(network, [IMAGES], (2,), match_moments=False)[2]  # a layer rounded plainly gains no bias
    files = Files(network, list(result.weights), {}, candidate_recipes(None, match_moments=False))
    assert files.size([2] * len(result.weights)) == result.file_bytes()


def _quantize_a_share(rank: int, world: int, path: str, build: Callable[[], nn.Module], budget: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    share = IMAGES[:64] if rank == 0 else IMAGES[64:]
    mixed = quantize(build(), [share], (), budgets=(budget,)).mixed[budget]
    torch.save((mixed.model.state_dict(), {k: w.grid for k, w in mixed.weights.items()}), f"{path}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("build", "budget"),
    [(LoudAndQuiet, 1_500), pytest.param(resnet8, 16_000, marks=pytest.mark.slow(seconds=12))],
)
def test_two_processes_equal_one(build: Callable[[], nn.Module], budget: int, tmp_path):
    """The choice, and the weights."""
    path = str(tmp_path / "store")
    # By fork, in which nothing is imported anew.
    mp.start_processes(_quantize_a_share, (2, path, build, budget), nprocs=2, start_method="fork")
    alone = quantize(build(), [IMAGES], (), budgets=(budget,)).mixed[budget]
    for rank in range(2):
        state, grids = torch.load(f"{path}.{rank}")
        assert all(torch.equal(grids[name], weight.grid) for name, weight in alone.weights.items())
        for key, value in alone.model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
