"""Modules as people write them: quantized rightly, named with a true reason, or refused in a sentence."""

import copy
import warnings
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdq_lightning.errors import UserError
from kdq_lightning.quantization import Quantized, gram, load_packed, quantize
from kdq_lightning.quantization.gram import Patches, Rows
from kdq_lightning.quantization.torch_state import TorchState

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the weights are quantized")


@pytest.fixture
def images() -> Tensor:
    """96 smooth images, (96, 3, 8, 8)."""
    noise = torch.randn(96, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    return 2 * F.avg_pool2d(noise, 3, stride=1) + 0.2


class Net(nn.Module):
    """Two convolutions and a head; `between` is called around the second one."""

    def __init__(self, context=nullcontext):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.context = context

    def forward(self, images):
        x = self.first(images).relu()
        with self.context():
            x = self.second(x).relu()
        return self.head(x.float().clone().mean((2, 3)))


def only(model: nn.Module, images: Tensor, bits: int = 4, **options) -> Quantized:
    return quantize(model, [images], bits=(bits,), **options)[bits]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def notes(result: Quantized) -> dict[str, str]:
    """The reason of each layer or parameter that stays in float."""
    return {layer.name: layer.note for layer in result.layers if not layer.levels}


def assert_same_codes(a: Quantized, b: Quantized) -> None:
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        assert torch.equal(weight.codes, b.weights[name].codes) and torch.equal(weight.scale, b.weights[name].scale)


# Contexts inside the forward


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        return outputs * 2 if func is torch.mean else outputs


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "default dtype": default_dtype,
    "function mode": Doubling,
    "dispatch mode": Watching,
    "device": lambda: torch.device("cpu"),
    "flags": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "deterministic": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "two at once": lambda: stacked(torch.inference_mode(), Doubling(), default_dtype()),
}


@contextmanager
def stacked(*contexts):
    from contextlib import ExitStack

    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_inside_forward_stays_inside(name, images):
    before = TorchState.now()
    result = only(Net(CONTEXTS[name]), images)
    assert TorchState.now() == before
    plain = only(Net(), images)
    for layer, weight in plain.weights.items():  # the kernels of other flags round sums differently
        assert (weight.codes != result.weights[layer].codes).float().mean() < 0.02


def test_a_layer_is_solved_on_what_it_gets_inside_autocast(images):
    before = TorchState.now()
    result = only(Net(lambda: torch.autocast("cpu", torch.bfloat16)), images, bits=8)
    assert TorchState.now() == before
    with torch.no_grad():
        assert distance(result.model(images), Net()(images)) < 0.02
    assert torch.equal(result.weights["first"].codes, only(Net(), images, bits=8).weights["first"].codes)


class Switching(nn.Module):
    """Switches for everyone and never back; or stops half way."""

    def __init__(self, fails):
        super().__init__()
        self.net, self.fails, self.calls = Net(), fails, 0

    def forward(self, images):
        torch.set_default_dtype(torch.float64)
        torch.set_autocast_enabled("cpu", True)
        Doubling().__enter__()
        x = self.net.first(images)
        with torch.inference_mode():
            x = self.net.second(x)
            if self.fails and len(images) > 2:
                raise ValueError("no")
        return self.net.head(x.float().clone().mean((2, 3)))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_outside_changes_whatever_a_forward_leaves_on(fails, images):
    before = TorchState.now()
    with pytest.raises(ValueError, match="no") if fails else nullcontext():
        only(Switching(fails), images)
    assert TorchState.now() == before


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode, torch.enable_grad]
)
def test_the_callers_contexts_change_nothing(around, images):
    plain = only(Net(), images)
    with around():
        before = TorchState.now()
        inside = only(Net(), images)
        assert TorchState.now() == before
    assert_same_codes(plain, inside)
    assert not any(parameter.is_inference() for parameter in inside.model.parameters())


def test_compiled_code_runs_as_it_is(images):
    """A paused forward can't be traced."""
    net = Net()
    net.second.compile(backend="eager")
    assert_same_codes(only(net, images), only(Net(), images))


# What forwards that take turns can put in each other's way


class Remembering(Net):
    def forward(self, images):
        self.skipped = self.first(images).relu()
        x = self.second(self.skipped)
        return self.head((x + self.skipped[:, :, 2:, 2:]).mean((2, 3)))


class Collecting(Net):
    """Reads what a hook has put aside, as U-Nets do."""

    def __init__(self):
        super().__init__()
        self.seen = {}
        self.first.register_forward_hook(self.keep)

    def keep(self, module, inputs, outputs):
        self.seen["first"] = outputs

    def forward(self, images):
        x = self.second(self.first(images).relu())
        return self.head((x + self.seen["first"].relu()[:, :, 2:, 2:]).mean((2, 3)))


class Passing(Net):
    def forward(self, images):
        skipped = self.first(images).relu()
        return self.head((self.second(skipped) + skipped[:, :, 2:, 2:]).mean((2, 3)))


@pytest.mark.parametrize("kind", [Remembering, Collecting])
def test_activations_kept_in_the_module_are_a_forwards_own(kind, images):
    assert_same_codes(only(kind(), images), only(Passing(), images))


def test_activations_kept_outside_the_module_are_refused(images):
    shelf = {}

    class Outside(Net):
        def forward(self, images):
            shelf["x"] = self.first(images).relu()
            return self.head((self.second(shelf["x"]) + shelf["x"][:, :, 2:, 2:]).mean((2, 3)))

    with pytest.raises(UserError, match="keeps something outside its modules"):
        only(Outside(), images)


# The walk's layer call is the network's


def hooked(register) -> nn.Module:
    net = Net()
    register(net.second)
    return net


class Around(Net):
    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, images):
        x = self.after(self.second(self.before(self.first(images).relu()))).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("register", "before", "after"),
    [
        (lambda layer: layer.register_forward_hook(lambda _, args, out: -out), nn.Identity(), lambda x: -x),
        (lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0] + 1,)), lambda x: x + 1, nn.Identity()),
        (
            lambda layer: layer.register_forward_hook(lambda _, args, kwargs, out: out * 2, with_kwargs=True),
            nn.Identity(),
            lambda x: x * 2,
        ),
    ],
)
def test_hooks_run_once(register, before, after, images):
    assert_same_codes(only(hooked(register), images), only(Around(before, after), images))


def test_a_hook_that_changes_the_weight_is_refused(images):
    def clamp(layer, args):
        layer.weight.data.clamp_(-0.01, 0.01)

    def quieten(layer, args):
        layer.weight = nn.Parameter(layer.weight / 2)

    for hook in (clamp, quieten):
        with pytest.raises(UserError, match=r"changes second\.weight in eval mode"):
            only(hooked(lambda layer, hook=hook: layer.register_forward_pre_hook(hook)), images)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Padding(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Caching(nn.Conv2d):
    def forward(self, x):
        if not hasattr(self, "cached"):
            self.cached = self.weight.detach().clone()
        return F.conv2d(x, self.cached, self.bias)


class Biasless(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args, bias=False)

    def forward(self, x):
        return F.conv2d(x, self.weight)


class Clamping(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.clamp(max=0.5))


class Harmless(nn.Conv2d):
    def forward(self, x):
        assert x.dim() == 4
        return super().forward(x)


@pytest.mark.parametrize("kind", [Standardized, Padding, Caching, Biasless, Clamping])
def test_a_layer_with_a_forward_of_its_own_stays_in_float(kind, images):
    net = Net()
    net.second = kind(8, 8, 3)
    result = only(net, images)
    assert list(result.weights) == ["first", "head"] and "not the plain operation" in notes(result)["second"]
    assert torch.equal(result.model.second.weight, net.second.weight)


def test_a_subclass_that_computes_the_plain_operation_is_quantized(images):
    net = Net()
    net.second = Harmless(8, 8, 3)
    net.second.load_state_dict(Net().second.state_dict())
    assert_same_codes(only(net, images), only(Net(), images))


class Scaled(nn.Linear):
    def forward(self, x, factor):
        return super().forward(x) * factor


class Sideways(nn.Linear):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_more_arguments_and_instance_forwards_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled, self.sideways, self.patched = Scaled(6, 6), Sideways(6, 6), nn.Linear(6, 6)
            self.patched.forward = self.replacement
            self.head = nn.Linear(6, 2)

        def replacement(self, x):
            return F.linear(x, self.patched.weight.abs())

        def forward(self, x):
            x = self.patched(self.sideways(self.scaled(x, 2.0)))
            return self.head(x.mean(1))

    found = notes(only(Odd(), torch.randn(64, 6, 6)))
    assert "more than its input" in found["scaled"]
    assert "not the plain operation" in found["sideways"]
    assert "replaced on the instance" in found["patched"]
    assert "head" not in found


def test_replaced_weights_and_vmap_are_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.mapped, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = torch.func.functional_call(self.inner, {"weight": self.inner.weight * 3}, (x,))
            return self.head(torch.vmap(self.mapped)(x).relu())

    found = notes(only(Functional(), torch.randn(64, 6)))
    assert found.keys() == {"inner", "mapped"}
    assert "replaced during the forward" in found["inner"] and "torch.func" in found["mapped"]


# Types


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers_stay_integers(dtype):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(256, 8), nn.Linear(8, 4)

        def forward(self, tokens):
            assert tokens.dtype == dtype
            return self.head(self.table(tokens.long()).mean(1))

    result = only(Lookup(), torch.randint(0, 256, (64, 5), dtype=dtype))
    assert list(result.weights) == ["head"] and "Embedding" in notes(result)["table.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("cast", [True, False])
def test_precision_of_the_network(dtype, cast, images):
    """Whether the images are of its type or not; the results are."""
    net = Net().to(dtype)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(net.first, nn.ReLU(), net.second, nn.ReLU(), *pooled, net.head)
    wide = copy.deepcopy(plain).float()
    result = only(plain, images.to(dtype) if cast else images)
    assert {parameter.dtype for parameter in result.model.parameters()} == {dtype}
    with torch.no_grad():
        error = distance(result.model.float()(images), wide(images))
        assert error < 1.5 * distance(only(wide, images).model(images), wide(images)) + 0.002


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [nn.Linear(12, 5), nn.Conv1d(12, 5, 1)])
def test_products_of_half_precision_are_taken_in_float32(dtype, layer):
    layer = copy.deepcopy(layer).to(dtype)
    inputs = torch.randn(400, 12).to(dtype)
    shaped = inputs if isinstance(layer, nn.Linear) else inputs.unsqueeze(2)
    rows = Rows(Patches(layer), [[shaped, shaped]], torch.zeros(400, 1, dtype=torch.int64), 0)
    (found,) = rows.collect([True])
    x, weight = inputs.double(), layer.weight.detach().double().flatten(1)
    torch.testing.assert_close(found.A[0], x.T @ x, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.BW[0], x.T @ (x @ weight.T), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.y_square[0, 0], (x @ weight.T).square().sum(0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("together", "products"), [(None, [50, 14, 36, 28, 22, 42, 8, 50, 6, 44, 20, 10]), (256, [256, 74]), (4096, [330])]
)
@pytest.mark.parametrize("kept", [None, 3])
def test_rows_are_gathered_across_parts(together, products, kept, monkeypatch):
    """A product of few rows costs less than adding it up does."""
    layer, inputs = nn.Linear(12, 5), torch.randn(330, 12)
    held_out = None if kept is None else torch.arange(330) % 4 >= kept
    parts = [[x, x + 1] for x in inputs.split(50)]
    sizes = []
    add = gram._add_lower
    monkeypatch.setattr(gram, "_add_lower", lambda A, rows: (sizes.append(rows.shape[1]), add(A, rows)))
    rows = Rows(Patches(layer), parts, torch.zeros(330, 1, dtype=torch.int64), 0, held_out, together)
    (found,) = rows.collect([True])
    x = inputs.double() if held_out is None else inputs[~held_out].double()
    assert found.rows == len(x) == sum(sizes) and len(sizes) == len(products)
    assert held_out is not None or sizes == products
    torch.testing.assert_close(found.A[0], (x + 1).T @ (x + 1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.B[0], (x + 1).T @ x, rtol=1e-5, atol=1e-3)


def test_a_bfloat16_network_loads_to_the_bit(tmp_path, images):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).bfloat16().eval()

    result = only(build(), images.bfloat16())
    result.save(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "a", build())(images.bfloat16()), result.model(images.bfloat16()))


# Few rows, nothing to match


@pytest.mark.parametrize("kind", ["constant", "one image", "nearly constant"])
def test_moments_of_next_to_nothing_scale_nothing(kind, images):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    given = {
        "constant": torch.full((32, 3, 8, 8), 0.7),
        "one image": images[:1],
        "nearly constant": torch.full((32, 3, 8, 8), 0.7) + 1e-4 * images[:32],
    }[kind]
    result = only(net, given, bits=8)
    for name, weight in result.weights.items():
        ratio = weight.dequantize().flatten(1).norm(dim=1) / net.get_submodule(name).weight.flatten(1).norm(dim=1)
        assert ((ratio > 0.9) & (ratio < 1.1)).all()
    with torch.no_grad():
        assert distance(result.model(images), net(images)) < 0.05


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [2, 8, 32, 60])
def test_few_rows_are_never_worse_than_rounding(bits, count):
    """On inputs that nobody has seen, whose columns are correlated; rounding is what is taken when in doubt."""
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) / 8
    inputs = torch.randn(2000, 64) @ mixing + 0.5
    net = nn.Sequential(nn.Linear(64, 32))
    found = only(net, inputs[:count], bits=bits)
    plain = only(net, inputs[:count], bits=bits, solver="rounding", refine=0, match_moments=False)
    with torch.no_grad():
        outputs = net(inputs[1000:])
        assert distance(found.model(inputs[1000:]), outputs) <= 1.02 * distance(plain.model(inputs[1000:]), outputs)


def test_a_ridge_is_rows_of_its_own(images):
    """λ·I in the Gram matrices is √λ·I in the rows; the published mode has none."""
    inputs = torch.randn(20, 30, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(30, 8, bias=False)).double()
    options = {"refine": 0, "match_moments": False, "solver": "gpfq", "scale": "layer", "codebook": "paper"}
    official = only(net, inputs, mode="official")
    assert official.layers[0].rows == 20 and "rounded" not in official.layers[0].note
    ridged = only(net, inputs, **options)
    assert not torch.equal(ridged.weights["0"].codes, official.weights["0"].codes)


# In float, but not without a word


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.volume = nn.ConvTranspose2d(3, 4, 2), nn.Conv3d(1, 2, 3)
        self.rnn, self.pair, self.table = nn.GRU(4, 4, batch_first=True), nn.Bilinear(4, 4, 4), nn.Embedding(5, 4)
        self.raw = nn.Parameter(torch.randn(4, 4))
        self.functional, self.unused, self.twice = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        x = self.up(images).flatten(2).transpose(1, 2)[:, :16]
        v = self.volume(images[:, None, :, :3, :3].expand(-1, -1, 3, 3, 3)).mean((1, 2, 3, 4))
        x = self.rnn(x)[0] @ self.raw + self.table.weight[0] + v[:, None, None]
        x = self.pair(x, x) + F.linear(x, self.functional.weight) + self.attention(x, x, x)[0]
        x = self.twice(x) * self.twice.weight.norm()
        return self.head(x.mean(1))


def test_every_matrix_stands_in_the_report(images):
    net = Everything()
    with pytest.warns(UserWarning, match=r"only .*% of the weights are quantized"):
        result = only(net, images)
    reasons = notes(result)
    assert list(result.weights) == ["head"]
    assert reasons["unused"] == "never reached: left in float"
    assert "outside the layer's own forward" in reasons["functional"]
    assert "used elsewhere, too" in reasons["twice"]
    assert "outside the layer's own forward" in reasons["attention.out_proj"]
    for name, kind in {
        "up.weight": "ConvTranspose2d",
        "volume.weight": "Conv3d",
        "rnn.weight_hh_l0": "GRU",
        "pair.weight": "Bilinear",
        "table.weight": "Embedding",
        "attention.in_proj_weight": "MultiheadAttention",
        "raw": "Everything",
    }.items():
        assert kind in reasons[name], name
    matrices = {name for name, parameter in net.named_parameters() if parameter.dim() > 1}
    named = {name if name in matrices else f"{name}.weight" for name in (layer.name for layer in result.layers)}
    assert named == matrices
    assert result.share == 12 / sum(parameter.numel() for parameter in net.parameters() if parameter.dim() > 1)


def test_the_share_is_in_the_file_and_no_warning_where_all_is_quantized(tmp_path, images):
    from kdq_lightning.quantization.packing import read_metadata

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(Net(), images).share == 1
    result = only(Everything(), images)
    result.save(tmp_path / "a", {"network": "everything"})
    assert read_metadata(tmp_path / "a") == {"network": "everything", "quantized_share": f"{result.share:.4g}"}


def test_the_fast_path_of_an_encoder_is_off_while_walking():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    result = only(nn.Sequential(encoder, nn.Linear(16, 4)).eval(), torch.randn(64, 6, 16))
    assert {"0.layers.0.linear1", "0.layers.1.linear2", "1"} <= set(result.weights)
    assert torch.backends.mha.get_fastpath_enabled()


# As given


def test_channels_last_stays_and_loads_to_the_bit(tmp_path, images):
    net = Net().to(memory_format=torch.channels_last)
    result = only(net, images)
    assert result.model.second.weight.is_contiguous(memory_format=torch.channels_last)
    result.save(tmp_path / "a")
    fresh = Net().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "a", fresh)(images), result.model(images))


def test_frozen_weights_stay_frozen(images):
    net = Net()
    net.first.weight.requires_grad_(False)
    net.head.bias.requires_grad_(False)
    net.second.bias = None
    net.second.requires_grad_(False)
    trained = {name for name, parameter in only(net, images).model.named_parameters() if parameter.requires_grad}
    assert trained == {"first.bias", "head.weight"}


class TiedLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


class TiedTable(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(self.mix(self.table(tokens).mean(1)).relu())


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    result = only(TiedLayers(), torch.randn(128, 16))
    assert result.model.b.weight is result.model.a.weight
    assert "shares the weight of a" in next(layer.note for layer in result.layers if layer.name == "b")
    result.save(tmp_path / "a")
    fresh, inputs = TiedLayers().eval(), torch.randn(8, 16)
    assert (
        torch.equal(load_packed(tmp_path / "a", fresh)(inputs), result.model(inputs))
        and fresh.b.weight is fresh.a.weight
    )
    result = only(TiedTable(), torch.randint(0, 9, (64, 5)))
    assert result.model.out.weight is result.model.table.weight and set(result.weights) == {"mix"}
    assert any("used elsewhere, too" in note for note in notes(result).values())


@pytest.mark.parametrize(
    "compute",
    [
        spectral_norm,
        parametrizations.spectral_norm,
        weight_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_are_baked_into_the_copy(compute, tmp_path):
    torch.manual_seed(0)
    net, inputs = nn.Sequential(compute(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)), torch.randn(256, 16)
    net(inputs)  # leaves a weight with a history behind, which can't be copied
    before = {name: value.clone() for name, value in net.state_dict().items()}
    result = only(net, inputs, bits=8)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        assert distance(result.model(inputs), copy.copy(net).eval()(inputs)) < 0.02
    assert {name for name, _ in result.model.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    result.save(tmp_path / "a")
    with pytest.raises(UserError, match=r"0\.weight|0\.param|0\.bias"):
        load_packed(tmp_path / "a", net)


# Refused for a true reason only


def test_memory_counts_activations_not_weights():
    net = nn.Sequential(nn.Linear(768, 1500), nn.ReLU(), nn.Linear(1500, 4))
    assert set(quantize(net, [torch.randn(64, 768)], bits=(4,), max_memory_gb=2.0, refine=0)) == {4}


class Returning(Net):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, images):
        outputs = super().forward(images)
        return self.wrap(outputs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: out.mean(),
        lambda out: {"logits": out, "loss": None, "count": len(out)},
        lambda out: (out > 0, out.argmax(1)),
        lambda out: (out, (out[None], out.expand(2, *out.shape))),
        lambda out: [{"boxes": row} for row in out],
        lambda out: torch.complex(out, out),
        lambda out: None,
    ],
)
def test_outputs_of_every_form(wrap, images):
    assert_same_codes(only(Returning(wrap), images), only(Net(), images))


class InPlace(Net):
    def forward(self, images):
        return super().forward(images.sub_(0.1).div_(0.5))


class InPlaceSlices(Net):
    def forward(self, images):
        for channel in range(3):
            images[:, channel].sub_(0.1).div_(0.5)
        return super().forward(images)


class OutOfPlace(Net):
    def forward(self, images):
        return super().forward((images - 0.1) / 0.5)


@pytest.mark.parametrize("kind", [InPlace, InPlaceSlices])
def test_a_network_may_change_its_input(kind, images):
    before = images.clone()
    found = quantize(kind(), [images], bits=(3, 4))[4]
    assert torch.equal(images, before)
    assert_same_codes(found, quantize(OutOfPlace(), [images], bits=(3, 4))[4])


@pytest.mark.parametrize("owner", ["", "second"])
def test_nan_in_a_buffer_is_no_change(owner, images):
    net = Net()
    net.get_submodule(owner).register_buffer("unset", torch.full((3,), torch.nan))
    net.register_buffer("mask", torch.tensor([True, False]))
    assert len(only(net, images).weights) == 3


class Auxiliary(Net):
    """Heads that only training calls, in the forward or by a switch."""

    def __init__(self):
        super().__init__()
        self.auxiliary, self.second_auxiliary = nn.Linear(8, 4), nn.Conv2d(8, 4, 1)
        self.deep_supervision = True

    def forward(self, images):
        outputs = super().forward(images)
        if self.training and self.deep_supervision:
            x = self.first(images)
            return outputs, self.auxiliary(x.mean((2, 3))), self.second_auxiliary(x)
        return outputs


def test_auxiliary_heads_are_named(images):
    result = only(Auxiliary().train(), images)
    assert notes(result) == dict.fromkeys(("auxiliary", "second_auxiliary"), "never reached: left in float")
    assert len(result.weights) == 3


def test_lazy_layers_find_their_shapes_on_the_copy(images):
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    assert set(only(net, images).weights) == {"0", "3"}
    assert isinstance(net[0], nn.LazyConv2d) and nn.parameter.is_lazy(net[3].weight)


def test_batches_of_every_form(images):
    expected = only(Net(), images)
    for batches in (
        images,
        images.numpy(),
        [images[:50], images[50:]],
        [(images, torch.zeros(96))],
        [[images.numpy(), np.zeros(96)]],
        (part for part in images.split(40)),
    ):
        assert_same_codes(quantize(Net(), batches, bits=4)[4], expected)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, a, b):
        return self.head(a + b)


@pytest.mark.parametrize(
    ("network", "batches", "words"),
    [
        (nn.Linear(4, 2), [{"x": torch.randn(4, 4)}], "a calibration batch is a dict"),
        (nn.Linear(4, 2), ["images"], "a calibration batch is a str"),
        (nn.Linear(4, 2), [torch.tensor(1.0)], "a single number"),
        (TwoInputs(), [(torch.randn(4, 4), torch.randn(4, 4))], "forward takes as its only argument"),
        (nn.Linear(4, 2), [torch.randn(4, 5)], r"float32 of shape \(4, 5\)"),
        (nn.Linear(4, 2), [torch.randint(0, 5, (4, 4))], "int64 of shape"),
    ],
)
def test_batches_that_cannot_be_used(network, batches, words):
    with pytest.raises(UserError, match=words) as caught:
        quantize(network, batches, bits=4)
    assert "\n" not in str(caught.value)


class TimeFirst(nn.Module):
    """(tokens, images, channels), and one layer that gets no image at all, as in swin's position bias."""

    def __init__(self):
        super().__init__()
        self.inner, self.bias, self.head = nn.Linear(8, 8), nn.Linear(2, 8), nn.Linear(8, 3)
        self.register_buffer("places", torch.randn(10, 2))

    def forward(self, x):
        x = self.inner(x.transpose(0, 1)).relu() + self.bias(self.places)[:1]
        return self.head(x.mean(0))


@pytest.mark.parametrize(("count", "tokens"), [(60, 15), (10, 5), (32, 32), (1, 1), (40, 10)])
def test_layers_that_do_not_get_the_images_first_are_named(count, tokens):
    result = only(TimeFirst(), torch.randn(count, tokens, 8))
    assert "head" in result.weights and "bias" in notes(result)
    assert tokens == 1 or set(notes(result)) == {"inner", "bias"}


def test_a_network_that_is_one_layer_is_packed(tmp_path):
    net, inputs = nn.Linear(64, 32), torch.randn(500, 64)
    result = only(net, inputs, bits=2)
    result.save(tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 64 * 32
    assert torch.equal(load_packed(tmp_path / "a", nn.Linear(64, 32))(inputs), result.model(inputs))
