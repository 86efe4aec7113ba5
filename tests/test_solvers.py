"""One layer: solvers on Gram matrices against the same algorithms on the data, and against brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from kdq_lightning.quantization import solution
from kdq_lightning.quantization.codebooks import CODEBOOKS, Alphabet
from kdq_lightning.quantization.gram import Gram
from kdq_lightning.quantization.recipes import Recipe, best_recipe
from kdq_lightning.quantization.solution import (
    candidate_scales,
    choose_scale,
    coordinate_descent,
    greedy,
    match_moments,
    solve,
)
from kdq_lightning.quantization.solvers import SOLVERS

ROWS, SIZE, NEURONS = 200, 70, 6  # more columns than one block of feedback


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the float and of a quantized network, with a column that is dead in the latter, and weights."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    x = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64) @ mixing / 8 + 0.3
    x_quantized = x + 0.2 * torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    x_quantized[:, 5] = 0
    return x, x_quantized, torch.randn(SIZE, NEURONS, generator=generator, dtype=torch.float64)


def gram_of(x: Tensor, x_quantized: Tensor, weight: Tensor) -> Gram:
    y = x @ weight
    return Gram(
        rows=len(x),
        A=(x_quantized.T @ x_quantized)[None],
        B=(x_quantized.T @ x)[None],
        BW=(x_quantized.T @ y)[None],
        y_square=y.square().sum(0)[None, None],
        y_sum=y.sum(0)[None, None],
        x_sum=x_quantized.sum(0)[None, None],
    )


def test_error_from_the_gram_is_the_direct_error(data):
    x, x_quantized, weight = data
    q = weight.round()
    direct = (x @ weight - x_quantized @ q).square().sum(0)
    torch.testing.assert_close(gram_of(*data).error(q[None])[0, 0], direct)


def quadratic_greedy(H: Tensor, v: Tensor, alphabet: Alphabet, first: Tensor | None = None) -> Tensor:
    """Greedy rounding that solves for the columns still free before each column: slow and obvious."""
    q = torch.zeros_like(v)
    size = len(v)
    for t in range(size):
        free = torch.arange(t, size)
        # The optimum of (v - q)ᵀH(v - q) over the free columns, the others being fixed.
        offset = torch.linalg.solve(H[free][:, free], H[free][:, :t] @ (v[:t] - q[:t])) if t else torch.zeros(size, 1)
        target = v[t] + offset[0] if t else v[t]
        q[t] = alphabet.round(first if t == 0 and first is not None else target)
    return q


@pytest.mark.parametrize("solver", ["gptq", "least_squares", "qronos"])
def test_least_squares_solvers_are_the_greedy_optimum(data, solver):
    x, x_quantized, weight = data
    gram, alphabet, scale = gram_of(*data), Alphabet("int", 3), 0.5
    A = x_quantized.T @ x_quantized
    damping = 0.01 * A.diagonal().mean()
    H = A + damping * torch.eye(SIZE, dtype=torch.float64)
    v = weight if solver == "gptq" else torch.linalg.solve(H, x_quantized.T @ (x @ weight) + damping * weight)
    first = None
    if solver == "qronos":
        rest = x @ weight - x_quantized[:, 1:] @ weight[1:]
        first = x_quantized[:, 0] @ rest / A[0, 0] / scale
    targets, feedback, _ = SOLVERS[solver].recursion(gram, weight[None])
    levels = greedy(targets / scale, feedback, alphabet)[0]
    assert torch.equal(levels, quadratic_greedy(H, v / scale, alphabet, first))


def test_gpfq_is_the_recursion_on_the_data(data):
    x, x_quantized, weight = data
    alphabet, scale = Alphabet("paper", 3), 0.5
    targets, feedback, _ = SOLVERS["gpfq"].recursion(gram_of(*data), weight[None])
    levels = greedy(targets / scale, feedback, alphabet)[0]
    u = torch.zeros(ROWS, NEURONS, dtype=torch.float64)
    for t in range(SIZE):
        u += x[:, t, None] * weight[t]
        norm = x_quantized[:, t].square().sum()
        value = x_quantized[:, t] @ u / norm if norm else weight[t]
        assert torch.equal(levels[t], alphabet.round(value / scale))
        u -= x_quantized[:, t, None] * levels[t] * scale


@pytest.mark.parametrize("solver", ["gptq", "least_squares"])
def test_the_residuals_of_a_recursion_tell_the_error(data, solver):
    gram, weight = gram_of(*data), data[2][None]
    recursion = SOLVERS[solver].recursion(gram, weight)
    found, expected = [], []
    for scale in (0.3, 0.5, 0.8):
        residual = recursion.targets / scale
        levels = greedy(residual, recursion.feedback, Alphabet("int", 3), residual=residual)
        scales = torch.full((1, 1, 1, NEURONS), scale, dtype=torch.float64)
        found.append(recursion.score.errors(levels[:, :, None], residual[:, :, None], scales)[0, 0, 0])
        expected.append(gram.error(levels * scale)[0, 0])
    found, expected = torch.stack(found), torch.stack(expected)
    torch.testing.assert_close(found - found[0], expected - expected[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codebook", ["int", "signed"])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_the_scale_chosen_in_float32_is_the_one_of_least_error(data, solver, codebook, granularity):
    gram, weight = gram_of(*data), data[2][None]
    recipe = Recipe(3, solver, codebook, granularity)
    candidates, recursion = candidate_scales(weight, recipe), SOLVERS[solver].recursion(gram, weight)
    errors = torch.stack(
        [
            gram.error(scale * greedy(recursion.targets / scale, recursion.feedback, recipe.alphabet))
            for scale in candidates
        ]
    )
    chosen = choose_scale(gram, recursion, candidates, recipe)
    if granularity == "layer":
        assert torch.equal(chosen, candidates[errors.sum((1, 2, 3)).argmin()])
    else:
        assert torch.equal(chosen, candidates.gather(0, errors.argmin(0, keepdim=True))[0])


def test_strips_of_a_product_are_the_product():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 330, generator=generator, dtype=torch.float64)  # more than two strips
    weight = torch.randn(330, 5, generator=generator, dtype=torch.float64)
    gram = gram_of(x, x, weight)
    torch.testing.assert_close(gram.ahead(weight[None]), gram.A.triu(1) @ weight)
    torch.testing.assert_close(gram.energy(weight[None])[0, 0], (x @ weight).square().sum(0))


def slow_solution(gram: Gram, weight: Tensor, recipe: Recipe) -> Tensor:
    """Every candidate and its error in float64, and every round of coordinate descent to its end."""
    ridged = gram.with_ridge(weight, recipe.ridge)
    targets, feedback, _ = SOLVERS[recipe.solver].recursion(ridged, weight)
    candidates = candidate_scales(weight, recipe)
    solved = torch.stack([greedy(targets / scale, feedback, recipe.alphabet) for scale in candidates])
    errors = torch.stack([ridged.error(q * scale) for q, scale in zip(solved, candidates, strict=True)])
    best = errors.argmin(0, keepdim=True)
    levels, scale = solved.gather(0, best.expand(1, *solved.shape[1:]))[0], candidates.gather(0, best)[0]
    diagonal = ridged.A.diagonal(dim1=1, dim2=2).unsqueeze(2)
    for _ in range(recipe.refine):
        targets = (ridged.BW / scale - ridged.A.triu(1) @ levels) / diagonal
        levels = greedy(targets, ridged.A.triu(1) / diagonal.mT, recipe.alphabet)
        scale = (levels * ridged.BW).sum(1, keepdim=True) / (levels * (ridged.A @ levels)).sum(1, keepdim=True)
    return levels


@pytest.mark.parametrize(("size", "neurons"), [(288, 96), (1200, 16)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float32_candidates_and_the_early_stop_change_few_codes(bits, size, neurons):
    """None in a narrow layer, at most three in a thousand in a wide one, and the error by at most 0.1 %."""
    generator = torch.Generator().manual_seed(bits)
    mixing = torch.randn(64, size, generator=generator, dtype=torch.float64) / 8
    x = torch.randn(2 * size, 64, generator=generator, dtype=torch.float64) @ mixing
    x = (x + 0.5 * torch.randn(2 * size, size, generator=generator, dtype=torch.float64) + 0.3).relu()
    x_quantized = x + 0.05 * torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(size, neurons, generator=generator, dtype=torch.float64)
    gram, recipe = gram_of(x, x_quantized, weight), best_recipe(bits)
    found, slow = solve(gram, weight[None], recipe), slow_solution(gram, weight[None], recipe)
    share = float((found.levels != slow).double().mean())
    assert share <= (3e-3 if size > 1000 else 0.0), share
    scale, shift = match_moments(gram, slow, torch.ones_like(found.scale), gram.energy(slow))
    error = (x @ weight - x_quantized @ (slow * scale)[0] - shift[0]).square().sum()
    assert found.squared_error.sum() < 1.001 * error


def test_neurons_stop_one_by_one(data, monkeypatch):
    """A neuron whose codes have settled leaves the sweeps; what the others get is the same."""
    gram, recipe = gram_of(*data), Recipe(3, refine=20)
    widths = []
    sweep = solution.greedy
    monkeypatch.setattr(
        solution, "greedy", lambda targets, *rest: (widths.append(targets.shape[2]), sweep(targets, *rest))[1]
    )
    start, scale = torch.zeros(1, SIZE, NEURONS, dtype=torch.float64), torch.full((1, 1, NEURONS), 0.7).double()
    levels, scales, ahead = coordinate_descent(gram, start, scale, recipe)
    assert widths == sorted(widths, reverse=True) and widths[0] == NEURONS and len(widths) < 20
    torch.testing.assert_close(ahead, gram.A.triu(1) @ levels)
    for neuron in range(NEURONS):
        one = slice(neuron, neuron + 1)
        alone = coordinate_descent(gram.neurons(one), start[:, :, one], scale[:, :, one], recipe)
        assert torch.equal(alone[0], levels[:, :, one])
        torch.testing.assert_close(alone[1], scales[:, :, one])


def test_coordinate_descent_is_one_sweep_then_the_best_scale(data):
    x, x_quantized, weight = data
    recipe, scale = Recipe(2, codebook="midrise", refine=1), torch.full((1, 1, NEURONS), 0.7, dtype=torch.float64)
    gram, start = gram_of(*data), Alphabet("midrise", 2).round(weight / 0.7)
    levels, refitted, _ = coordinate_descent(gram, start[None], scale, recipe)
    codes, target = start.clone(), x @ weight
    for t in range(SIZE):
        if t == 5:
            continue  # dead: its level stays
        rest = target / 0.7 - x_quantized @ codes + x_quantized[:, t, None] * codes[t]
        codes[t] = recipe.alphabet.round(x_quantized[:, t] @ rest / x_quantized[:, t].square().sum())
    assert torch.equal(levels[0], codes)
    y_hat = x_quantized @ codes
    torch.testing.assert_close(refitted[0, 0], (y_hat * target).sum(0) / y_hat.square().sum(0))
    assert (gram.error(levels * refitted) <= gram.error(start[None] * 0.7)).all()


def test_one_scale_a_layer_is_refitted_over_the_layer(data):
    x, x_quantized, weight = data
    scale = torch.full((1, 1, NEURONS), 0.7, dtype=torch.float64)
    start = Alphabet("int", 3).round(weight / 0.7)[None]
    levels, refitted, _ = coordinate_descent(gram_of(*data), start, scale, Recipe(3, scale="layer", refine=1))
    y_hat = x_quantized @ levels[0]
    expected = ((x @ weight) * y_hat).sum() / y_hat.square().sum()
    torch.testing.assert_close(refitted, expected.expand(1, 1, NEURONS))


def test_moments_match(data):
    x, x_quantized, weight = data
    levels = weight.round()[None]
    levels[:, :, 0] = 0  # a channel without deviation keeps its scale
    gram = gram_of(*data)
    scale, shift = match_moments(gram, levels, torch.ones(1, 1, NEURONS, dtype=torch.float64), gram.energy(levels))
    y, y_hat = x @ weight, x_quantized @ (levels * scale)[0] + shift[0]
    torch.testing.assert_close(y_hat.mean(0), y.mean(0))
    torch.testing.assert_close(y_hat.std(0)[1:], y.std(0)[1:])
    assert scale[0, 0, 0] == 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_solver_and_codebook_reports_the_error_of_what_it_stores(data, solver, codebook):
    x, x_quantized, weight = data
    recipe = Recipe(3, solver, codebook)
    solution = solve(gram_of(*data), weight[None], recipe)
    q = (solution.levels * solution.scale)[0]
    assert torch.isin(solution.levels.float(), recipe.alphabet.grid).all()
    direct = (x @ weight - x_quantized @ q - solution.bias_shift[0]).square().sum(0)
    torch.testing.assert_close(solution.squared_error[0, 0], direct)
    assert direct.sum() < 0.5 * (x @ weight).square().sum()
    assert torch.equal(solution.scale, solution.scale.float().double())
    if codebook != "signed":
        assert (solution.scale > 0).all()


def test_refined_two_bits_come_close_to_the_best_of_all_codes():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    recipe = Recipe(1, codebook="midrise", refine=6, match_moments=False)
    solution = solve(gram_of(x, x, weight), weight[None], recipe)
    y = x @ weight
    for neuron in range(5):
        best = min(
            float(y[:, neuron].square().sum() - (p @ y[:, neuron]) ** 2 / (p @ p))
            for p in (x @ torch.tensor(code, dtype=torch.float64) for code in itertools.product((-0.5, 0.5), repeat=7))
        )
        assert solution.squared_error[0, 0, neuron] <= 1.25 * best


def test_groups_are_solved_apart(data):
    x, x_quantized, weight = data
    one = gram_of(*data)
    other = gram_of(x.flip(1), x_quantized.flip(1), weight)
    fields = ("A", "B", "BW", "y_square", "y_sum", "x_sum")
    both = Gram(ROWS, **{name: torch.cat([getattr(one, name), getattr(other, name)]) for name in fields})
    together = solve(both, weight.expand(2, -1, -1), Recipe(2))
    for i, gram in enumerate((one, other)):
        alone = solve(gram, weight[None], Recipe(2))
        assert torch.equal(together.levels[i : i + 1], alone.levels)
        torch.testing.assert_close(together.scale[i : i + 1], alone.scale)
