"""From streams of layer inputs to Gram matrices: all that a solver needs to know about the calibration images.

Only the chosen patches are ever unfolded. Products of at most 1,024 rows are taken in float32 (in float64 for a network
in float64) and added into float64 sums, which is several times cheaper than products in float64. The results are as
exact as float64 except for very few weights that lie halfway between two levels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Conv1d | nn.Conv2d | nn.Linear

CHUNK_ROWS = 1024
BLOCK_ROWS = 2048  # gathered at a time
BLOCK_SAMPLES = 64  # gathered at a time at most, where rows are not gathered across parts
STRIP = 144  # narrower products waste more than the symmetry of A saves


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Return the layers that can be quantized, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Layer)}


def weight_name(layer: str) -> str:
    """Return the name of a layer's weight in its network; a network that is a layer itself has the name ""."""
    return f"{layer}.weight" if layer else "weight"


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
        return self.energy(weight) - 2 * (weight * self.BW).sum(1, keepdim=True) + self.y_square

    def ahead(self, weight: Tensor) -> Tensor:
        """Return the strictly upper part of A times q, (groups, N, neurons): what comes after each column."""
        product = torch.empty_like(weight)
        size = weight.shape[1]
        for start in range(0, size, STRIP):
            strip, stop = slice(start, start + STRIP), min(start + STRIP, size)
            torch.matmul(self.A[:, strip, strip].triu(1), weight[:, strip], out=product[:, strip])
            product[:, strip].baddbmm_(self.A[:, strip, stop:], weight[:, stop:])
        return product

    def energy(self, weight: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Return |X̃q|² = qᵀAq of each neuron, (groups, 1, neurons); `ahead` is `ahead(weight)` where that is known."""
        if ahead is None:
            ahead = self.ahead(weight)
        diagonal = self.A.diagonal(dim1=1, dim2=2).unsqueeze(2)
        return (weight * (2 * ahead + diagonal * weight)).sum(1, keepdim=True)

    def with_ridge(self, weight: Tensor, factor: float) -> "Gram":
        """Return the sums of |Xw - X̃q|² + λ|w - q|² with λ = factor · mean(diag A) · min(1, N / rows) in each group.

        Few rows say little about many columns, and a solver that trusts them alone fits their noise; the penalty draws
        the weights that the rows say nothing about to the float ones.

        Args:
            weight: w, (groups, N, neurons).
            factor: 0 for no ridge.
        """
        if not factor:
            return self
        columns = self.A.shape[1]
        penalty = factor * min(1.0, columns / self.rows) * self.A.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        A, B = self.A.clone(), None if self.B is None else self.B.clone()
        for matrix in (A,) if B is None else (A, B):
            matrix.diagonal(dim1=1, dim2=2).add_(penalty.squeeze(2))
        square = self.y_square + penalty * weight.square().sum(1, keepdim=True)
        return replace(self, A=A, B=B, BW=self.BW + penalty * weight, y_square=square)

    def neurons(self, part: slice | Tensor) -> "Gram":
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

    def of(self, positions: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the rows of some positions lie.

        Args:
            positions: (samples, draws) int64, indices into the flattened grid.
            samples: (samples,) int64, which samples they are of.

        Returns:
            The pixel of each kernel position of each row, counted over all samples, and which of these lie outside.
        """
        before = samples.unsqueeze(1) * self.sample
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
            (groups, rows, N), float32 or float64.
        """
        if isinstance(self.layer, nn.Linear):
            return at_least_float32(inputs.reshape(-1, inputs.shape[-1]).index_select(0, pixels)[None])
        if self.layer.padding_mode != "zeros":
            inputs = F.pad(inputs, self.layer._reversed_padding_repeated_twice, self.layer.padding_mode)
        channels = inputs.shape[1]
        taken = inputs.movedim(1, -1).reshape(-1, channels).index_select(0, pixels).index_fill_(0, outside, 0.0)
        taken = at_least_float32(taken).view(-1, math.prod(self.kernel), self.groups, channels // self.groups)
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


def at_least_float32(values: Tensor) -> Tensor:
    """Return values of half precision as float32, others as they are."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class Rows:
    """The rows of one layer's inputs that a walk looks at.

    Attributes:
        patches: How the layer cuts its inputs.
        parts: Inputs of the layer, part of the samples by part; in each those of the float network, then of each
            quantized network, (samples, ...).
        positions: (samples, draws), the patches to take of each sample.
        first_sample: Index of the first of these samples in the whole calibration set.
        held_out: (samples,) bool, the samples that the layer is not solved on, but tried; None for none.
        together: Samples gathered at a time at most, across parts, where a sample has few rows: a product of few rows
            costs less than adding it to N² sums does. None gathers at most BLOCK_SAMPLES, within each part.
    """

    patches: Patches
    parts: Sequence[Sequence[Tensor]]
    positions: Tensor
    first_sample: int
    held_out: Tensor | None = None
    together: int | None = None

    def collect(self, cross: Sequence[bool]) -> list[Gram]:
        """Gather the Gram matrices over the rows that are not held out, summed over all processes.

        Args:
            cross: For each quantized network, whether B is wanted.
        """
        patches, weight = self.patches, self._weight()
        gathered = self._gathered(weight)
        grams = [_empty(weight, wanted) for wanted in cross]
        ones = weight.new_ones(len(weight), 1, CHUNK_ROWS)
        solved = None if self.held_out is None else ~self.held_out
        for x, streams in self._unfold(solved):
            y = [chunk @ gathered for chunk in x]
            y_square = sum(chunk.square().sum(1, keepdim=True).double() for chunk in y)
            y_sum = sum(chunk.sum(1, keepdim=True).double() for chunk in y)
            for gram, q in zip(grams, streams, strict=True):
                gram.y_square += y_square
                gram.y_sum += y_sum
                for x_chunk, y_chunk, q_chunk in zip(x, y, q, strict=True):
                    _add_lower(gram.A, q_chunk)
                    gram.x_sum += ones[:, :, : q_chunk.shape[1]] @ q_chunk  # several times faster than sum(1)
                    if gram.B is None:
                        gram.BW += q_chunk.mT @ y_chunk
                    else:
                        gram.B += q_chunk.mT @ x_chunk
        samples = len(self.positions) if solved is None else int(solved.sum())
        for gram in grams:
            gram.rows = samples * self.positions.shape[1]
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

    def errors(self, candidates: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[list[list[float]], int]:
        """Return |Xw - X̃q - d|² of some candidates over the rows held out, summed over all processes.

        Args:
            candidates: For each quantized network as many pairs of weights q, (groups, N, neurons), and bias shifts d,
                (groups, 1, neurons).

        Returns:
            For each quantized network one error a candidate; and the number of rows.
        """
        weight = self._gathered(self._weight())
        pairs = [[(self._gathered(q).to(weight), d.to(weight)) for q, d in some] for some in candidates]
        found = torch.zeros(len(pairs), len(pairs[0]), dtype=torch.float64, device=weight.device)
        for x, streams in self._unfold(self.held_out):
            y = [chunk @ weight for chunk in x]
            for i, q in enumerate(streams):
                for j, (candidate, shift) in enumerate(pairs[i]):
                    for y_chunk, q_chunk in zip(y, q, strict=True):
                        found[i, j] += (y_chunk - q_chunk @ candidate - shift).double().square().sum()
        assert self.held_out is not None
        rows = self.held_out.sum() * self.positions.shape[1]
        if dist.is_initialized():
            dist.all_reduce(found)
            dist.all_reduce(rows)
        return found.tolist(), int(rows)

    def _weight(self) -> Tensor:
        return columns(at_least_float32(self.patches.layer.weight.detach()), self.patches.groups)

    def _gathered(self, weight: Tensor) -> Tensor:
        """Put columns of a weight, (groups, N, neurons), into the order of unfolded rows."""
        order = self.patches.reorder(torch.arange(self.patches.columns, device=weight.device), 0)
        return weight[:, order.argsort()]

    def _unfold(self, chosen: Tensor | None) -> Iterator[tuple[list[Tensor], Iterator[list[Tensor]]]]:
        """Unfold the inputs of some samples, or of all, block by block.

        Yields:
            The float network's rows in chunks, (groups, rows, N), and the same rows of each quantized network.
        """
        patches, positions = self.patches, self.positions
        places = patches.places(self.parts[0][0])
        for pieces in self._blocks():
            found = []
            for part, block, place in pieces:
                wanted = positions[place]
                samples = torch.arange(len(wanted), device=wanted.device)
                if chosen is not None:
                    samples = samples[chosen[place]]
                    wanted = wanted[samples]
                if len(samples):
                    found.append((self.parts[part], block, places.of(wanted, samples)))

            def rows(stream: int, found: list[Any] = found) -> list[Tensor]:
                taken = [patches.rows(part[stream][block], *where) for part, block, where in found]
                return _chunks(taken[0] if len(taken) == 1 else torch.cat(taken, 1))

            if found:
                yield rows(0), map(rows, range(1, len(self.parts[0])))

    def _blocks(self) -> Iterator[list[tuple[int, slice, slice]]]:
        """Cut the parts into blocks of up to BLOCK_ROWS rows, at multiples of a power of two samples.

        So shards cut at such multiples repeat the products of a single process.

        Yields:
            The pieces of each block: the part, the samples in it, and the same samples in all parts.
        """
        length = 2 ** max(0, (BLOCK_ROWS // self.positions.shape[1]).bit_length() - 1)
        length = min(length, self.together or BLOCK_SAMPLES)
        pieces: list[tuple[int, slice, slice]] = []
        before = 0
        for number, part in enumerate(self.parts):
            size = len(part[0])
            cuts = [0, *range(length - (self.first_sample + before) % length, size, length), size]
            for start, stop in pairwise(cuts):
                pieces.append((number, slice(start, stop), slice(before + start, before + stop)))
                if (self.first_sample + before + stop) % length == 0 or (stop == size and not self.together):
                    yield pieces
                    pieces = []
            before += size
        if pieces:
            yield pieces


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
