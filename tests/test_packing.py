"""Packed files: codes as bits and back, networks equal to the bit, honest sizes, and every bad file refused whole."""

import json
import math
import resource
import signal
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdq_lightning.errors import UserError
from kdq_lightning.networks import build_network
from kdq_lightning.quantization import packing
from kdq_lightning.quantization.bitstream import pack_codes, packed_size, unpack_codes, word_layout
from kdq_lightning.quantization.codebooks import CODEBOOKS, QuantizedWeight, grid
from kdq_lightning.quantization.packing import (
    is_packed,
    load_packed,
    packed_bytes,
    read_metadata,
    read_weights,
    save_packed,
    unpack,
)


def random_weight(shape, codebook="int", bits=2, per_channel=True, seed=0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    levels = grid(codebook, bits)
    codes = torch.randint(len(levels), tuple(shape), generator=generator).to(torch.int16)
    scale = torch.rand(shape[0] if per_channel else 1, generator=generator) * 0.1 + 0.01
    return QuantizedWeight(codes, levels, -scale if codebook == "signed" else scale, codebook, bits)


def quantized(model: nn.Module, gained_bias=True, **options) -> tuple[nn.Module, dict[str, QuantizedWeight]]:
    """Put random codes into every convolution and linear layer, as the engine would, and shake all the rest."""
    weights = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            weights[name] = random_weight(module.weight.shape, seed=seed, **options)
            module.weight = nn.Parameter(weights[name].dequantize())
            if module.bias is None and gained_bias:
                module.bias = nn.Parameter(torch.randn(len(module.weight)))
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval(), weights


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def reference_bits(codes: list[int], levels: int) -> str:
    """The format spelt out with Python's integers: digits to words, words to bits, lowest first."""
    digits, bits = word_layout(levels)
    stream = ""
    for start in range(0, len(codes), digits):
        word = sum(code * levels**place for place, code in enumerate(codes[start : start + digits]))
        stream += format(word, f"0{bits}b")[::-1]
    return stream


# Codes as bits


@given(st.integers(2, 300), st.data())
@settings(deadline=None, max_examples=150)
def test_codes_round_trip_and_match_the_format_spelt_out(levels, data):
    codes = data.draw(st.lists(st.integers(0, levels - 1), max_size=130))
    packed = pack_codes(torch.tensor(codes, dtype=torch.int16), levels)
    assert packed.dtype == torch.uint8 and len(packed) == packed_size(len(codes), levels)
    assert unpack_codes(packed, len(codes), levels).tolist() == codes
    written = "".join(format(byte, "08b")[::-1] for byte in packed.tolist())
    expected = reference_bits(codes, levels)
    assert written.rstrip("0") == expected.rstrip("0")


def test_words_waste_little():
    assert word_layout(5) == (3, 7)  # three base-5 digits in 7 bits
    assert [word_layout(2**bits) for bits in range(1, 9)] == [(1, bits) for bits in range(1, 9)]
    for levels in range(2, 260):
        digits, bits = word_layout(levels)
        assert levels**digits <= 2**bits <= 2**63
        assert bits / digits <= min(math.log2(levels) + 0.14, (levels - 1).bit_length())


def test_no_byte_is_wasted_at_the_end():
    assert [packed_size(count, 5) for count in (0, 1, 2, 3, 6)] == [0, 1, 1, 1, 2]  # 0, 3, 5, 7, 14 bits
    assert packed_size(7, 257) == 8 and packed_size(8, 257) == 9  # 57, then 57 + 9 bits


# Networks in files


@given(
    st.sampled_from([(codebook, bits) for codebook in CODEBOOKS for bits in range(1, 9)]).filter(
        lambda pair: pair != ("narrow", 1)
    ),
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.booleans(),
)
@settings(deadline=None, max_examples=120)
def test_round_trip_of_every_codebook_and_width(tmp_path_factory, pair, shape, per_channel):
    path = tmp_path_factory.mktemp("packed") / "layer.safetensors"
    weight = random_weight(shape, *pair, per_channel)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight.dequantize())
    network = nn.ModuleDict({"layer": layer})
    save_packed(path, network, {"layer": weight}, {})

    fresh = nn.ModuleDict({"layer": nn.Linear(1, 1, bias=False)})
    fresh["layer"].weight = nn.Parameter(torch.randn(*shape))
    load_packed(path, fresh)
    assert torch.equal(fresh["layer"].weight, layer.weight)


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_outputs_are_equal_to_the_bit(tmp_path, name):
    network, weights = quantized(build_network(name, 10), codebook="paper", bits=2)
    save_packed(tmp_path / "a.safetensors", network, weights, {"network": name})
    fresh = build_network(name, 10).eval()
    assert load_packed(tmp_path / "a.safetensors", fresh) is fresh
    inputs = torch.randn(2, 3, 32, 32)
    assert network(inputs).isfinite().all() and torch.equal(fresh(inputs), network(inputs))
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_file_is_little_more_than_its_contents(tmp_path):
    network, weights = quantized(build_network("resnet20", 10), codebook="int", bits=2)
    save_packed(tmp_path / "a.safetensors", network, weights, {"network": "resnet20"})
    codes = sum(weight.codes.numel() for weight in weights.values()) / 4
    batchnorm_and_biases = 4 * (4 * 688 + 688 + 10)
    scales = 4 * (688 + 10)
    assert sum(map(packed_bytes, weights.values())) == codes + scales
    content = codes + scales + batchnorm_and_biases
    assert content < (tmp_path / "a.safetensors").stat().st_size < content + 1000


def test_equal_networks_give_equal_files(tmp_path):
    network, weights = quantized(small_network())
    metadata = {"network": "small", "dataset": "none", "mean": "[0.5]"}
    for name in "ab":
        save_packed(tmp_path / name, network, weights, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_metadata(tmp_path / "a") == metadata


def test_levels_that_the_codebook_does_not_have_are_not_written(tmp_path):
    network, weights = quantized(small_network(), codebook="int", bits=3)
    weights["0"] = replace(weights["0"], codebook="narrow")
    with pytest.raises(UserError, match="levels of layer 0 are not those of codebook 'narrow'"):
        save_packed(tmp_path / "a", network, weights, {})


def test_a_file_that_holds_its_own_levels_is_read(tmp_path):
    """The format allows them after a layer's scales, though nothing writes them."""
    network, weights = quantized(nn.Sequential(nn.Linear(6, 4, bias=False)), gained_bias=False, codebook="int", bits=3)
    save_packed(tmp_path / "a", network, weights, {})
    own = torch.tensor([-3.0, -1.5, -0.5, 0.0, 0.25, 1.0, 2.0, 5.0])
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        header = json.loads(file.metadata()["kdq_packed"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layout = json.loads(zlib.decompress(tensors[".layout"].numpy().tobytes()))
    layout["layers"]["0"][-1] = True
    tensors[".layout"] = torch.frombuffer(bytearray(zlib.compress(json.dumps(layout).encode())), dtype=torch.uint8)
    tensors[".floats"] = torch.cat([tensors[".floats"], own])
    header["checksum"] = packing._checksum({}, tensors)
    safetensors.torch.save_file(tensors, tmp_path / "a", {"kdq_packed": json.dumps(header)})
    loaded = load_packed(tmp_path / "a", nn.Sequential(nn.Linear(6, 4, bias=False)))
    assert torch.equal(loaded[0].weight, replace(weights["0"], grid=own).dequantize())
    assert torch.equal(read_weights(tmp_path / "a")["0"].grid, own)


def test_layers_left_float_other_types_and_plain_tensors_are_kept(tmp_path):
    def build() -> nn.Module:
        network = small_network()
        network.register_parameter("temperature", nn.Parameter(torch.zeros(()), requires_grad=False))
        network.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        network.register_buffer("codes", torch.zeros((), dtype=torch.bool))
        network.register_buffer("scratch", torch.zeros(3), persistent=False)
        return network

    network, weights = quantized(build())
    del weights["2"]
    network.temperature.data.fill_(3)
    network.steps.copy_(torch.tensor([2**40, -1]))
    network.codes.fill_(True)
    save_packed(tmp_path / "a", network, weights, {})
    loaded = load_packed(tmp_path / "a", build())
    assert torch.equal(loaded(images()), network(images()))
    assert loaded.temperature == 3 and not loaded.temperature.requires_grad
    assert loaded.steps.tolist() == [2**40, -1] and loaded.codes
    assert set(loaded.state_dict()) == set(network.state_dict())


def test_double_precision_and_memory_format_of_the_network_stay(tmp_path):
    network, weights = quantized(small_network())
    save_packed(tmp_path / "a", network, weights, {})
    fresh = small_network().double().to(memory_format=torch.channels_last)
    load_packed(tmp_path / "a", fresh)
    assert {tensor.dtype for tensor in fresh.parameters()} == {torch.float64}
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(fresh[0].weight.float(), network[0].weight) and torch.equal(
        fresh[0].bias.float(), network[0].bias
    )


# Shared tensors


class Twice(nn.Module):
    """One convolution under two names, and an embedding tied to the head, as language models have it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1, bias=False)
        self.again = self.first
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, images):
        return self.head(self.again(self.first(images)).mean((2, 3)) + self.embedding.weight.mean(0))


@pytest.mark.parametrize("tied", [True, False])
def test_shared_tensors(tmp_path, tied):
    network, weights = quantized(Twice())
    assert set(weights) == {"first", "head"}  # quantizing the head alone unties it
    if tied:
        network.embedding.weight = network.head.weight
    save_packed(tmp_path / "a", network, weights, {})
    loaded = load_packed(tmp_path / "a", Twice().eval())
    inputs = torch.randn(3, 4, 2, 2)
    assert torch.equal(loaded(inputs), network(inputs))
    assert loaded.again.weight is loaded.first.weight
    assert (loaded.embedding.weight is loaded.head.weight) == tied


def test_unpack_gives_the_whole_state_dict(tmp_path):
    """Under every name that a shared tensor has, with the gained biases, without BatchNorm's counters."""
    for network in (Twice(), small_network()):
        network, weights = quantized(network)
        save_packed(tmp_path / "a", network, weights, {"network": "none of ours"})
        state, metadata = unpack(tmp_path / "a")
        expected = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
        assert state.keys() == expected.keys() and metadata == {"network": "none of ours"}
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_tensor_shared_with_a_quantized_layer_is_stored_in_its_codes(tmp_path):
    network, weights = quantized(Twice())
    save_packed(tmp_path / "apart", network, weights, {})
    network.embedding.weight = network.head.weight
    save_packed(tmp_path / "tied", network, weights, {})
    assert stored_floats(tmp_path / "apart") - stored_floats(tmp_path / "tied") == network.embedding.weight.numel()


def stored_floats(path: Path) -> int:
    return safetensors.torch.load_file(path)[".floats"].numel()


def test_two_tied_layers_are_stored_once(tmp_path):
    network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    network, weights = quantized(network, bits=8)
    save_packed(tmp_path / "apart", network, weights, {})
    network[1].weight, weights["1"] = network[0].weight, weights["0"]
    save_packed(tmp_path / "tied", network, weights, {})
    assert (tmp_path / "apart").stat().st_size - (tmp_path / "tied").stat().st_size > 4000
    loaded = load_packed(tmp_path / "tied", nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    assert torch.equal(loaded[1].weight, network[0].weight)


# Bad files and bad disks


@pytest.fixture
def packed(tmp_path) -> Path:
    network, weights = quantized(small_network())
    save_packed(tmp_path / "small.safetensors", network, weights, {"network": "small"})
    return tmp_path / "small.safetensors"


def assert_refused(path: Path, network: nn.Module, *words: str) -> None:
    """The file is refused in one sentence with its name and the reason, and the network stays as it was."""
    before = {name: (tensor, tensor.clone()) for name, tensor in network.state_dict(keep_vars=True).items()}
    with pytest.raises(UserError) as caught:
        load_packed(path, network)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (path.name, *words)), message
    after = network.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_truncated(packed, kept):
    packed.write_bytes(packed.read_bytes()[:kept])
    assert_refused(packed, small_network(), "truncated")


def test_packed_files_are_told_from_others(packed):
    assert is_packed(packed) and not is_packed(packed.parent / "none")
    safetensors.torch.save_file(small_network().state_dict(), packed, {"format": "pt"})
    assert not is_packed(packed)
    packed.write_bytes(b"{}")
    assert not is_packed(packed)


def test_no_file(tmp_path):
    assert_refused(tmp_path / "none.safetensors", small_network(), "no packed file")


def test_foreign(packed):
    safetensors.torch.save_file(small_network().state_dict(), packed)
    assert_refused(packed, small_network(), "not a packed one")
    with pytest.raises(UserError, match="not a packed one"):
        read_metadata(packed)


def tampered(path: Path, **changes) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["kdq_packed"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {"kdq_packed": json.dumps({**header, **changes})})


def test_tampered_header(packed):
    tampered(packed, metadata={"network": "other"})
    assert_refused(packed, small_network(), "altered")


def test_other_version(packed):
    tampered(packed, version=99)
    assert_refused(packed, small_network(), "format 99")


def test_damaged_header(packed):
    safetensors.torch.save_file({"a": torch.zeros(1)}, packed, {"kdq_packed": "{}"})
    assert_refused(packed, small_network(), "damaged header")


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_flipped_bit_anywhere_is_found(tmp_path_factory, data):
    network, weights = quantized(small_network())
    path = tmp_path_factory.mktemp("flip") / "small.safetensors"
    save_packed(path, network, weights, {})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(content) - 1))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"small\.safetensors"):
        load_packed(path, small_network())


def test_wrong_networks(packed):
    wider = small_network()
    wider[4] = nn.Linear(64, 7)
    assert_refused(packed, wider, "4.weight has shape (5, 64) in the file and (7, 64)")
    assert_refused(packed, small_network()[:3], "the file has 2 tensors", "4.weight")
    assert_refused(packed, nn.Sequential(*small_network(), nn.Linear(5, 5)), "lacks 2 of its tensors, first 5.weight")
    affine = small_network()
    affine[1] = nn.BatchNorm2d(6, affine=False)
    assert_refused(packed, affine, "2 tensors that it lacks, first 1.weight")
    assert_refused(packed, build_network("resnet8", 10), "NarrowResNet")


def test_only_a_quantized_layer_may_gain_a_bias(tmp_path):
    network, weights = quantized(small_network())
    del weights["0"]
    save_packed(tmp_path / "a", network, weights, {})
    assert_refused(tmp_path / "a", small_network(), "first 0.bias")


def test_a_weight_changed_after_quantization_is_not_saved(tmp_path):
    network, weights = quantized(small_network())
    network[2].weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(UserError, match="layer 2 is not the one"):
        save_packed(tmp_path / "a", network, weights, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_file(packed):
    old = packed.read_bytes()
    network, weights = quantized(build_network("resnet8", 10))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"small.safetensors could not be written"):
            save_packed(packed, network, weights, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert packed.read_bytes() == old
    assert list(packed.parent.iterdir()) == [packed]


def test_the_old_file_is_swapped_not_overwritten(packed):
    old = packed.read_bytes()
    (packed.parent / "link").hardlink_to(packed)
    save_packed(packed, *quantized(build_network("resnet8", 10)), {})
    assert (packed.parent / "link").read_bytes() == old != packed.read_bytes()


def test_a_folder_in_the_way(tmp_path):
    network, weights = quantized(small_network())
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "a", tmp_path / "file" / "b"):
        with pytest.raises(UserError, match="could not be written"):
            save_packed(path, network, weights, {})
    save_packed(tmp_path / "new" / "folder" / "c", network, weights, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c", "file", "folder", "new"]
