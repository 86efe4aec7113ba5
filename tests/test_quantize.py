"""The walk over a network, against layer-by-layer float64 references."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import load_packed, quantize
from kdq_lightning.quantization.layer_choice import is_held_out
from kdq_lightning.quantization.quantize import place_among_all
from kdq_lightning.quantization.recipes import best_recipe

PLAIN = {"solver": "gpfq", "codebook": "paper", "scale": "layer", "refine": 0, "match_moments": False}


class Branching(nn.Module):
    """Layers registered in another order than they run in; a sum, a concatenation and a grouped branch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.late = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.side = nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        a = F.relu(self.norm(self.stem(images)))
        b = F.relu(self.side(images))
        a = F.relu(self.late(a))
        b = F.relu(self.depthwise(b))
        return self.head(torch.cat([a, b], 1).mean((2, 3)))


@pytest.fixture
def images() -> Tensor:
    """Smooth ones, as pictures are: on white noise rounding is hard to beat."""
    noise = torch.randn(48, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return 2 * F.avg_pool2d(noise, 3, stride=1) + 0.2


def seen(images: Tensor) -> Tensor:
    """The images that layers are solved on, where there are few."""
    return images[~is_held_out(torch.arange(len(images)), len(images))]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Branching().eval()


def unfold(layer: nn.Module, inputs: Tensor) -> Tensor:
    """All rows of a layer, (groups, rows, N), the slow way."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    columns = F.unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    columns = columns.transpose(1, 2).reshape(-1, layer.groups, layer.weight[0].numel())
    return columns.transpose(0, 1)


def published(weight: Tensor, x: Tensor, x_quantized: Tensor, step: float, half: int) -> Tensor:
    """The recursion of one group, neuron by neuron and column by column."""
    quantized = torch.zeros_like(weight)
    for neuron, w in enumerate(weight):
        u = torch.zeros(len(x), dtype=x.dtype)
        for t in range(weight.shape[1]):
            u = u + w[t] * x[:, t]
            norm = x_quantized[:, t] @ x_quantized[:, t]
            value = x_quantized[:, t] @ u / norm if norm > 0 else w[t]
            level = torch.floor(value / step + 0.5).clamp(-half, half)
            quantized[neuron, t] = step * level
            u = u - step * level * x_quantized[:, t]
    return quantized


def ridged(x: Tensor, x_quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Add the rows √λ·I to both inputs, which is what a ridge is."""
    rows, size = x.shape
    penalty = best_recipe(2).ridge * x_quantized.square().sum(0).mean() * min(1, size / rows)
    more = penalty.sqrt() * torch.eye(size, dtype=x.dtype)
    return torch.cat([x, more]), torch.cat([x_quantized, more])


def inputs_of(network: nn.Module, name: str, images: Tensor) -> Tensor:
    seen = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("bits", [2, 4])
@torch.no_grad()
def test_walk_equals_the_published_recursion_rerun_for_every_layer(network, images, bits):
    network, images = network.double(), images.double()
    result = quantize(network, images.split(20), bits=(bits, 8), patch_fraction=1.0, **PLAIN)[bits]
    images = seen(images)
    order = ["stem", "side", "late", "depthwise", "head"]
    assert [layer.name for layer in result.layers] == order
    reference = copy.deepcopy(network)
    half = 2 ** (bits - 1)
    for name in order:
        layer = reference.get_submodule(name)
        x = unfold(layer, inputs_of(network, name, images))
        x_quantized = unfold(layer, inputs_of(reference, name, images))
        rows = layer.weight.flatten(1).clone()
        step = float((1.16 / half * rows.abs().amax(1).mean()).float())
        groups = rows.chunk(len(x))
        pairs = [ridged(a, b) for a, b in zip(x, x_quantized, strict=True)]
        quantized = torch.cat([published(w, a, b, step, half) for w, (a, b) in zip(groups, pairs, strict=True)])
        # The file holds levels times a float32 scale, rounded to float32.
        layer.weight.copy_((quantized / step).round().float().mul(step).view_as(layer.weight))
        assert torch.equal(result.model.get_submodule(name).weight, layer.weight), name
        error = (x @ groups_of(rows, len(x)) - x_quantized @ groups_of(quantized, len(x))).norm()
        relative = error / (x @ groups_of(rows, len(x))).norm()
        report = next(layer for layer in result.layers if layer.name == name)
        assert report.relative_error == pytest.approx(float(relative), rel=1e-6)
        assert report.rows == x.shape[1]


def groups_of(rows: Tensor, groups: int) -> Tensor:
    return torch.stack(rows.chunk(groups)).mT


def test_model_given_is_not_changed_and_batchnorm_never(network, images):
    before = copy.deepcopy(network.state_dict())
    network.train()
    result = quantize(network, [images], bits=(2,))[2]
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items() if "norm" in key)


def test_model_holds_the_weights_of_its_codes(network, images):
    for width, result in quantize(network, [images], bits=(1, 2, 8)).items():
        for name, weight in result.weights.items():
            layer = result.model.get_submodule(name)
            assert torch.equal(layer.weight, weight.dequantize())
            assert weight.codes.dtype == torch.int16
            assert weight.codes.min() >= 0 and weight.codes.max() < len(weight.grid) <= 2**width
            solver = next(report.solver for report in result.layers if report.name == name)
            assert solver == "rounding" or isinstance(layer.bias, nn.Parameter)


def test_saved_network_loads_to_the_bit(network, images, tmp_path):
    result = quantize(network, [images], bits=(2,))[2]
    result.save(tmp_path / "network.safetensors", {"network": "branching"})
    loaded = load_packed(tmp_path / "network.safetensors", Branching().eval())
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    layer = result.layers[0]  # stem: 216 codes of two bits, 8 scales, 8 biases gained
    assert layer.packed_bytes == 216 * 2 // 8 + 4 * (8 + 8)


def test_quantized_stream_is_the_quantized_network(network, images):
    """Relative error of the last layer, from the Grams of the walk, is that of rerunning both networks."""
    result = quantize(network, [images], bits=(3, 2))[2]
    images = seen(images)
    with torch.no_grad():
        y, y_hat = network(images), result.model(images)
        relative = (y - y_hat).norm() / (y - network.head.bias).norm()
    assert result.layers[-1].relative_error == pytest.approx(float(relative), rel=1e-4)


def test_moments_of_every_channel_are_the_float_networks(network, images):
    result = quantize(network, [images], bits=(2,), patch_fraction=1.0)[2]
    images = seen(images)
    with torch.no_grad():
        matched = [layer.name for layer in result.layers if layer.solver != "rounding"]
        assert len(matched) > 2
        for name in matched:
            y = network.get_submodule(name)(inputs_of(network, name, images)).transpose(0, 1).flatten(1)
            model = result.model
            q = model.get_submodule(name)(inputs_of(model, name, images)).transpose(0, 1).flatten(1)
            torch.testing.assert_close(q.mean(1), y.mean(1), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(q.std(1), y.std(1), rtol=1e-3, atol=1e-4)


def test_widths_walk_alike_together_and_alone(network, images):
    together = quantize(network, [images], bits=(2, 3, 5))
    for width in (2, 3, 5):
        alone = quantize(network, images.split(7), bits=(width,))[width]
        for name, weight in alone.weights.items():
            assert torch.equal(weight.codes, together[width].weights[name].codes)


def test_sequences_and_tokens():
    """Conv1d, and a linear layer on (batch, tokens, features)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), Transpose(), nn.Linear(6, 5))
    options = {"solver": "rounding", "refine": 0, "match_moments": False}  # which holds nothing out
    result = quantize(network, [torch.randn(20, 4, 9)], bits=(8,), patch_fraction=0.1, **options)[8]
    assert [layer.rows for layer in result.layers] == [60, 40]  # four a column, in whole draws of each sample
    assert all(layer.relative_error < 0.02 for layer in result.layers)


def test_official_mode_takes_every_token_once():
    torch.manual_seed(0)
    network, tokens = nn.Linear(6, 5), torch.randn(20, 9, 6)
    official = quantize(network, [tokens], bits=(3,), mode="official")[3]
    flat = quantize(network, [tokens.flatten(0, 1)], bits=(3,), mode="official")[3]
    assert official.layers[0].rows == 180
    assert torch.equal(official.weights[""].codes, flat.weights[""].codes)
    assert official.layers[0].relative_error == pytest.approx(flat.layers[0].relative_error, rel=1e-5)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def test_layer_used_twice_is_solved_on_its_first_call(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(F.relu(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    network = Twice()
    result = quantize(network, [images], bits=(4,))[4]
    assert [layer.name for layer in result.layers] == ["conv", "head"]
    assert "called more than once" in result.layers[0].note
    once = quantize(network.conv, [images], bits=(4,))[4]
    assert torch.equal(once.model.weight, result.model.conv.weight)


def test_layer_called_by_keyword(images):
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(input=x)

    assert [layer.name for layer in quantize(ByKeyword(), [images], bits=(4,))[4].layers] == ["conv"]


def test_layer_never_reached_is_named_and_left_in_float(images):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 7)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.mean((2, 3)))

    network = Unused()
    result = quantize(network, [images], bits=(3,))[3]
    report = result.layers[-1]
    assert report.name == "spare" and report.levels == 0 and "never reached" in report.note
    assert report.packed_bytes == 4 * (21 + 7)
    assert torch.equal(result.model.spare.weight, network.spare.weight)


def test_layers_that_depend_on_the_images_are_refused():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.bright, self.dark = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.bright(x) if x.mean() > 0 else self.dark(x)

    images = torch.cat([torch.rand(64, 4), -torch.ones(64, 4)])
    with pytest.raises(UserError, match="decide which layer"):
        quantize(Choosing(), [images], bits=(4,))
    with pytest.raises(UserError, match="mixes the images"):
        quantize(Choosing(), [torch.tensor([[1.0], [-3.0]]).repeat(64, 4)], bits=(4,))


def test_few_rows_are_named():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    (layer,) = quantize(network, [torch.randn(30, 3, 4, 4)], bits=(4,))[4].layers
    assert "30 rows for 48 columns" in layer.note


def test_rows_are_four_a_column_where_there_are_so_many(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    options = {"solver": "rounding", "refine": 0, "match_moments": False}  # which holds nothing out
    first, second, head = quantize(network, [images], bits=(4,), patch_fraction=0.01, **options)[4].layers
    assert (first.rows, second.rows, head.rows) == (48 * 3, 48 * 3, 48)
    assert math.ceil(4 * 27 / 48) == math.ceil(4 * 36 / 48) == 3


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + 0 * self.calls


def with_nan() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        network[0].weight[0] = torch.nan
    return network


@pytest.mark.parametrize(
    ("network", "batches", "options", "words"),
    [
        (nn.Conv2d(3, 4, 3), [], {}, "no calibration images"),
        (nn.Conv2d(3, 4, 3), [torch.zeros(0, 3, 8, 8)], {}, "no calibration images"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 9, 9)], {}, "change their shape"),
        (nn.Conv2d(3, 4, 3), [torch.full((2, 3, 8, 8), torch.nan)], {}, "not finite"),
        (with_nan(), [torch.randn(4, 3, 8, 8)], {}, "layer 0 computes activations that are not finite"),
        (nn.ReLU(), [torch.randn(2, 3, 8, 8)], {}, "no Conv1d, Conv2d or Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), Noisy()), [torch.randn(4, 3, 8, 8)], {}, "eval mode"),
        (nn.Sequential(Counting(), nn.Conv2d(3, 4, 3)), [torch.randn(4, 3, 8, 8)], {}, "changes 0.calls"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            [torch.randn(4, 3, 8, 8)],
            {},
            "mixes the images",
        ),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"bits": (0,)}, "bits must be between 1 and 8"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"bits": (9,)}, "bits must be between 1 and 8"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"bits": ()}, "no bit width"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"bits": (1,), "codebook": "narrow"}, "single level"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"solver": "gpqf"}, "unknown solver"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"solver": "lsq"}, "now called least_squares"),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"codebook": "ternary"}, "unknown codebook"),
        (
            nn.Conv2d(3, 4, 3),
            [torch.randn(2, 3, 8, 8)],
            {"mode": "official", "refine": 1, "patch_fraction": 0.5},
            "fixes refine: leave",
        ),
        (nn.Conv2d(3, 4, 3), [torch.randn(2, 3, 8, 8)], {"patch_fraction": 0.0}, "patch_fraction"),
        (nn.Conv2d(3, 4, 3), [torch.randn(64, 3, 8, 8)], {"max_memory_gb": 1e-6}, "max_memory_gb"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(network, batches, options, words):
    with pytest.raises(UserError, match=words):
        quantize(network, batches, **{"bits": (3,), **options})


def test_a_process_without_images_is_named(monkeypatch: pytest.MonkeyPatch):
    """By every process alike: none may wait for one that has stopped."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "all_gather", lambda sizes, own: [sizes[0].fill_(4), sizes[1].copy_(own)])
    with pytest.raises(UserError, match="process 1 has no calibration images"):
        place_among_all(torch.zeros(0), seed=0)


def test_memory_limit_changes_the_walks_but_not_the_result(network, images):
    seen = []
    free = quantize(network, [images], bits=(2, 3, 4))
    tight = quantize(
        network,
        [images],
        bits=(2, 3, 4),
        max_memory_gb=1.3e-3,
        progress=lambda done, total, name: seen.append((done, total, name)),
    )
    assert seen[-1] == (15, 15, "head")  # three walks of five layers
    for width, result in tight.items():
        for name, weight in result.weights.items():
            assert torch.equal(weight.codes, free[width].weights[name].codes)
            assert torch.equal(weight.scale, free[width].weights[name].scale)


def test_a_network_that_views_its_activations(images):
    """`view` fails on channels-last activations, which the walk prefers."""

    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4 * 36, 2)

        def forward(self, x):
            x = self.conv(x)
            return self.head(x.view(x.size(0), -1))

    assert len(quantize(Viewing(), [images], bits=(4,))[4].layers) == 2


def _quantize_a_share(rank: int, world: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    network = build_network("resnet8", 10)
    images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    share = images[:64] if rank == 0 else images[64:]  # unequal shares, cut where the parts are
    results = quantize(network, [share], bits=(2,))
    torch.save({width: result.model.state_dict() for width, result in results.items()}, f"{path}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    path = str(tmp_path / "store")
    mp.start_processes(_quantize_a_share, (2, path), nprocs=2, start_method="fork")  # nothing is imported anew
    torch.manual_seed(0)
    network = build_network("resnet8", 10)
    images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for width, result in quantize(network, [images], bits=(2,)).items():
        for rank in range(2):
            shared = torch.load(f"{path}.{rank}")[width]
            for key, value in result.model.state_dict().items():
                torch.testing.assert_close(shared[key], value, rtol=1e-5, atol=1e-6)
