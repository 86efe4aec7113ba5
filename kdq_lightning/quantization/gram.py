"""From streams of layer inputs to Gram matrices: all that a solver needs to know about the calibration images.

Only the chosen patches are ever unfolded. Products of at most 1,024 rows are taken in the type of the activations and
added into float64 sums: as exact as float64 products up to a few rounding ties in a network, and several times cheaper.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Conv1d | nn.Conv2d | nn.Linear

CHUNK_ROWS = 1024
BLOCK_ROWS = 2048  # gathered at a time
BLOCK_SAMPLES = 64  # at most, where a sample has few rows
STRIP = 144  # narrower products waste more than the symmetry of A saves


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the layers that can be quantized, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


@dataclass
class Gram:
    """Sums over m rows of the float network's inputs X and a quantized network's inputs X̃ of one layer, for each group.

    Attributes:
        rows: m.
        A: X̃ᵀX̃, (groups, N, N) float64.
        B: X̃ᵀX, (groups, N, N), or None where no solver asks for it.
        BW: X̃ᵀXW = X̃ᵀY, (groups, N, neurons), with W the float weights and Y the float outputs before the bias.
        y_square: Σy², (groups, 1, neurons).
        y_sum: Σy, (groups, 1, neurons).
        x_sum: Column sums of X̃, (groups, 1, N).
    """

    rows: int
    A: Tensor
    B: Tensor | None
    BW: Tensor
    y_square: Tensor
    y_sum: Tensor
    x_sum: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """Return |Xw - X̃q|² of each neuron, (groups, 1, neurons), for the weights q, (groups, N, neurons)."""
        return (weight * (self.A @ weight - 2 * self.BW)).sum(1, keepdim=True) + self.y_square

    def neurons(self, part: slice) -> "Gram":
        """Return what concerns some of the neurons."""
        return replace(self, BW=self.BW[:, :, part], y_square=self.y_square[:, :, part], y_sum=self.y_sum[:, :, part])


@dataclass(frozen=True)
class Places:
    """Where in a sample a layer looks from each position of its grid.

    Attributes:
        sample: Pixels (or tokens) of one sample.
        pixels: That of each kernel position, (positions, kernel positions) int64.
        outside: Whether it lies in the zeros around the image instead, (positions, kernel positions) bool.
    """

    sample: int
    pixels: Tensor
    outside: Tensor

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the rows of some positions lie, (samples, draws) int64 indices into the flattened grid.

        Returns:
            The pixel of each kernel position of each row, counted over all samples, and which of these lie outside.
        """
        before = torch.arange(len(positions), device=positions.device).unsqueeze(1) * self.sample
        chosen = positions.flatten()
        pixels = self.pixels.index_select(0, chosen).view(len(positions), -1) + before
        return pixels.flatten(), self.outside.index_select(0, chosen).flatten().nonzero().flatten()


class Patches:
    """How one layer cuts its inputs into the rows that its weights multiply, each group apart."""

    def __init__(self, layer: Layer, *, disjoint: bool = False) -> None:
        """Describe a layer; `disjoint` steps by the kernel size instead of the stride, as the published code does."""
        self.layer = layer
        self.groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        self.columns = layer.weight[0].numel()
        if not isinstance(layer, nn.Linear):
            flat = (1,) * (2 - len(layer.kernel_size))  # a sequence is an image of height 1
            self.kernel = (*flat, *layer.kernel_size)
            self.stride = self.kernel if disjoint else (*flat, *layer.stride)
            self.dilation = (*flat, *layer.dilation)

    def grid(self, inputs: Tensor) -> tuple[int, int]:
        """Return the height and width of the grid of positions at which the layer looks at one sample."""
        if isinstance(self.layer, nn.Linear):
            return 1, math.prod(inputs.shape[1:-1])
        size = (*(1,) * (4 - inputs.dim()), *inputs.shape[2:])
        top, bottom, left, right = self._padding()
        height, width = (
            (extent + pad - dilation * (kernel - 1) - 1) // stride + 1
            for extent, pad, dilation, kernel, stride in zip(
                size, (top + bottom, left + right), self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    def places(self, inputs: Tensor) -> Places:
        """Return where the layer looks in a sample of this shape."""
        if isinstance(self.layer, nn.Linear):
            tokens = torch.arange(math.prod(inputs.shape[1:-1]), device=inputs.device).unsqueeze(1)
            return Places(len(tokens), tokens, torch.zeros_like(tokens, dtype=torch.bool))
        height, width = (*(1,) * (4 - inputs.dim()), *inputs.shape[2:])[-2:]
        top, bottom, left, right = self._padding()
        if self.layer.padding_mode != "zeros":  # then `rows` pads
            height, width, top, left = height + top + bottom, width + left + right, 0, 0
        axes = zip(self.grid(inputs), self.stride, (top, left), self.kernel, self.dilation, strict=True)
        y, x = (
            torch.arange(0, size * stride, stride)[:, None] - pad + torch.arange(0, kernel * step, step)
            for size, stride, pad, kernel, step in axes
        )
        y, x = y[:, None, :, None], x[None, :, None, :]
        outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
        pixels = (y * width + x).masked_fill(outside, 0)
        size = math.prod(self.kernel)
        return Places(height * width, *(part.reshape(-1, size).to(inputs.device) for part in (pixels, outside)))

    def rows(self, inputs: Tensor, pixels: Tensor, outside: Tensor) -> Tensor:
        """Unfold the positions that `Places.of` found, and no others.

        Columns are ordered (kernel position, channel): runs of channels copy whole.

        Returns:
            (groups, rows, N).
        """
        if isinstance(self.layer, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1]).index_select(0, pixels)[None]
        if self.layer.padding_mode != "zeros":
            inputs = F.pad(inputs, self.layer._reversed_padding_repeated_twice, self.layer.padding_mode)
        channels = inputs.shape[1]
        taken = inputs.movedim(1, -1).reshape(-1, channels).index_select(0, pixels).index_fill_(0, outside, 0.0)
        taken = taken.view(-1, math.prod(self.kernel), self.groups, channels // self.groups)
        return taken.permute(2, 0, 1, 3).reshape(self.groups, -1, self.columns)

    def _padding(self) -> tuple[int, int, int, int]:
        """Return the pixels added above, below, to the left and to the right."""
        assert not isinstance(self.layer, nn.Linear)
        left, right, *vertical = self.layer._reversed_padding_repeated_twice
        top, bottom = vertical or (0, 0)
        return top, bottom, left, right

    def reorder(self, gathered: Tensor, dim: int) -> Tensor:
        """Put a dimension of N from the order of `rows` into that of a flattened weight, (channel, kernel position)."""
        if isinstance(self.layer, nn.Linear):
            return gathered
        shape = gathered.shape
        split = gathered.view(*shape[:dim], math.prod(self.kernel), -1, *shape[dim + 1 :])
        return split.transpose(dim, dim + 1).reshape(shape)


def collect(
    patches: Patches, parts: Sequence[Sequence[Tensor]], positions: Tensor, *, first_sample: int, cross: Sequence[bool]
) -> list[Gram]:
    """Gather the Gram matrices of one layer, summed over all processes.

    Args:
        patches: How the layer cuts its inputs.
        parts: Inputs of the layer, part of the samples by part; in each those of the float network, then of each
            quantized network, (samples, ...).
        positions: (samples, draws), the patches to take of each sample.
        first_sample: Index of the first of these samples in the whole calibration set.
        cross: For each quantized network, whether B is wanted.
    """
    weight = columns(patches.layer.weight.detach(), patches.groups)
    order = patches.reorder(torch.arange(patches.columns, device=weight.device), 0)
    gathered = weight[:, order.argsort()]
    grams = [_empty(weight, wanted) for wanted in cross]
    ones = weight.new_ones(len(weight), 1, CHUNK_ROWS)
    places = patches.places(parts[0][0])
    for part, block, place in _blocks([len(part[0]) for part in parts], positions.shape[1], first_sample):
        inputs, *quantized = (stream[block] for stream in parts[part])
        where = places.of(positions[place])
        x = _chunks(patches.rows(inputs, *where))
        y = [chunk @ gathered for chunk in x]
        y_square = sum(chunk.square().sum(1, keepdim=True).double() for chunk in y)
        y_sum = sum(chunk.sum(1, keepdim=True).double() for chunk in y)
        for gram, stream in zip(grams, quantized, strict=True):
            gram.y_square += y_square
            gram.y_sum += y_sum
            for x_chunk, y_chunk, q_chunk in zip(x, y, _chunks(patches.rows(stream, *where)), strict=True):
                _add_lower(gram.A, q_chunk)
                gram.x_sum += ones[:, :, : q_chunk.shape[1]] @ q_chunk  # several times faster than sum(1)
                if gram.B is None:
                    gram.BW += q_chunk.mT @ y_chunk
                else:
                    gram.B += q_chunk.mT @ x_chunk
    for gram in grams:
        gram.rows = positions.numel()
        _sum_over_ranks(gram)
        _mirror(gram.A)
        gram.A = patches.reorder(patches.reorder(gram.A, 1), 2)
        gram.x_sum = patches.reorder(gram.x_sum, 2)
        if gram.B is None:
            gram.BW = patches.reorder(gram.BW, 1)
        else:
            gram.B = patches.reorder(patches.reorder(gram.B, 1), 2)
            gram.BW = gram.B @ weight.double()
    return grams


def _blocks(sizes: Sequence[int], draws: int, first_sample: int) -> Iterator[tuple[int, slice, slice]]:
    """Cut parts of these sizes into blocks of up to BLOCK_ROWS rows, at multiples of a power of two samples.

    So shards cut where parts are repeat the products of a single process.

    Yields:
        The part, the samples in it, and the same samples in all parts.
    """
    length = 2 ** max(0, (BLOCK_ROWS // draws).bit_length() - 1)
    length = min(length, BLOCK_SAMPLES)
    before = 0
    for part, size in enumerate(sizes):
        cuts = [0, *range(length - (first_sample + before) % length, size, length), size]
        for start, stop in pairwise(cuts):
            yield part, slice(start, stop), slice(before + start, before + stop)
        before += size


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[:, start : start + CHUNK_ROWS] for start in range(0, rows.shape[1], CHUNK_ROWS)]


def columns(weight: Tensor, groups: int) -> Tensor:
    """Return a weight, (out, in / groups, ...), as columns a group, (groups, N, out / groups)."""
    return weight.reshape(groups, len(weight) // groups, -1).mT


def _empty(weight: Tensor, cross: bool) -> Gram:
    groups, size, neurons = weight.shape

    def zeros(rows: int, cols: int) -> Tensor:
        return torch.zeros(groups, rows, cols, dtype=torch.float64, device=weight.device)

    B = zeros(size, size) if cross else None
    return Gram(0, zeros(size, size), B, zeros(size, neurons), zeros(1, neurons), zeros(1, neurons), zeros(1, size))


def _strips(size: int) -> Iterator[slice]:
    width = max(STRIP, -(-size // 4))
    yield from (slice(start, min(start + width, size)) for start in range(0, size, width))


def _add_lower(A: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rowsᵀ·rows, and what little lies above it within strips: 5/8 of the whole product."""
    for strip in _strips(A.shape[1]):
        A[:, strip.start :, strip] += rows[:, :, strip.start :].mT @ rows[:, :, strip]


def _mirror(A: Tensor) -> None:
    """Fill in what `_add_lower` left out."""
    for strip in _strips(A.shape[1]):
        A[:, strip, strip.stop :] = A[:, strip.stop :, strip].mT


def _sum_over_ranks(gram: Gram) -> None:
    if dist.is_initialized():
        rows = torch.tensor(gram.rows, device=gram.A.device)
        for part in (rows, gram.A, gram.BW if gram.B is None else gram.B, gram.y_square, gram.y_sum, gram.x_sum):
            dist.all_reduce(part)
        gram.rows = int(rows)
