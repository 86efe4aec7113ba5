"""From streams of layer inputs to Gram matrices: all that a solver needs to know about the calibration images.

Only the chosen patches are ever unfolded. Products of at most 512 rows are taken in the type of the activations and
added into float64 sums: as exact as float64 products up to a few rounding ties in a network, and several times cheaper.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Conv1d | nn.Conv2d | nn.Linear

BLOCK_IMAGES = 32  # blocks start at multiples of this, so shards cut there repeat the products of a single process
CHUNK_ROWS = 512
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
        padding = self.layer._reversed_padding_repeated_twice
        size = (*(1,) * (4 - inputs.dim()), *inputs.shape[2:])
        pads = (padding[2] + padding[3] if len(padding) == 4 else 0, padding[0] + padding[1])
        height, width = (
            (extent + pad - dilation * (kernel - 1) - 1) // stride + 1
            for extent, pad, dilation, kernel, stride in zip(
                size, pads, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    def rows(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """Unfold the chosen positions alone.

        Columns are ordered (kernel position, channel): runs of channels copy whole.

        Args:
            inputs: What the layer is given, (samples, ...).
            positions: (samples, draws) int64, indices into the flattened `grid`.

        Returns:
            (groups, samples * draws, N).
        """
        if isinstance(self.layer, nn.Linear):
            width = math.prod(inputs.shape[1:-1])
            start = torch.arange(len(inputs), device=inputs.device)[:, None] * width + positions
            return inputs.reshape(-1, inputs.shape[-1]).index_select(0, start.flatten())[None]
        _, grid_width = self.grid(inputs)
        mode = self.layer.padding_mode
        inputs = F.pad(inputs, self.layer._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(2)
        samples, channels, height, width = inputs.shape
        top, left = positions // grid_width * self.stride[0], positions % grid_width * self.stride[1]
        start = (torch.arange(samples, device=inputs.device)[:, None] * height + top) * width + left
        down, right = (
            torch.arange(size, device=inputs.device) * step
            for size, step in zip(self.kernel, self.dilation, strict=True)
        )
        pixels = start.flatten()[:, None] + (down[:, None] * width + right).flatten()
        taken = inputs.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, pixels.flatten())
        taken = taken.view(start.numel(), -1, self.groups, channels // self.groups)
        return taken.permute(2, 0, 1, 3).reshape(self.groups, start.numel(), self.columns)

    def column_order(self) -> Tensor:
        """Return where each column of a flattened weight, (channel, kernel position), stands among those of `rows`."""
        if isinstance(self.layer, nn.Linear):
            return torch.arange(self.columns)
        return torch.arange(self.columns).view(math.prod(self.kernel), -1).T.flatten()


def collect(
    patches: Patches,
    streams: Sequence[Tensor],
    positions: Tensor,
    *,
    first_sample: int,
    cross: Sequence[bool],
) -> list[Gram]:
    """Gather the Gram matrices of one layer, summed over all processes.

    Args:
        patches: How the layer cuts its inputs.
        streams: Inputs of the float network, then of each quantized network, (samples, ...) each.
        positions: (samples, draws), the patches to take of each sample.
        first_sample: Index of the first of these samples in the whole calibration set.
        cross: For each quantized network, whether B is wanted.
    """
    order = patches.column_order().to(positions.device)
    back = order.argsort()
    weight = columns(patches.layer.weight.detach(), patches.groups)[:, back]
    grams = [_empty(patches, weight, wanted) for wanted in cross]
    ones = weight.new_ones(len(weight), 1, CHUNK_ROWS)
    for block in _blocks(len(positions), first_sample):
        x = _chunks(patches.rows(streams[0][block], positions[block]))
        y = [chunk @ weight for chunk in x]
        y_square = sum(chunk.square().sum(1, keepdim=True).double() for chunk in y)
        y_sum = sum(chunk.sum(1, keepdim=True).double() for chunk in y)
        for gram, stream in zip(grams, streams[1:], strict=True):
            gram.y_square += y_square
            gram.y_sum += y_sum
            quantized = _chunks(patches.rows(stream[block], positions[block]))
            for x_chunk, y_chunk, q_chunk in zip(x, y, quantized, strict=True):
                _add_lower(gram.A, q_chunk)
                gram.x_sum += ones[:, :, : q_chunk.shape[1]] @ q_chunk  # several times faster than sum(1)
                if gram.B is None:
                    gram.BW += q_chunk.mT @ y_chunk
                else:
                    gram.B += q_chunk.mT @ x_chunk
    for gram in grams:
        gram.rows = positions.numel()
        gram.A = gram.A.tril() + gram.A.tril(-1).mT
        _sum_over_ranks(gram)
        _reorder(gram, order)
        if gram.B is not None:
            gram.BW = gram.B @ columns(patches.layer.weight.detach(), patches.groups).double()
    return grams


def columns(weight: Tensor, groups: int) -> Tensor:
    """Return a weight, (out, in / groups, ...), as columns a group, (groups, N, out / groups)."""
    return weight.reshape(groups, len(weight) // groups, -1).mT


def _empty(patches: Patches, weight: Tensor, cross: bool) -> Gram:
    groups, size, neurons = weight.shape

    def zeros(rows: int, cols: int) -> Tensor:
        return torch.zeros(groups, rows, cols, dtype=torch.float64, device=weight.device)

    B = zeros(size, size) if cross else None
    return Gram(0, zeros(size, size), B, zeros(size, neurons), zeros(1, neurons), zeros(1, neurons), zeros(1, size))


def _blocks(samples: int, first: int) -> Iterator[slice]:
    start = 0
    while start < samples:
        stop = min(samples, start + BLOCK_IMAGES - (first + start) % BLOCK_IMAGES)
        yield slice(start, stop)
        start = stop


def _chunks(rows: Tensor) -> list[Tensor]:
    return [rows[:, start : start + CHUNK_ROWS] for start in range(0, rows.shape[1], CHUNK_ROWS)]


def _add_lower(A: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rowsᵀ·rows, and what little lies above it within strips: 5/8 of the whole product."""
    size = A.shape[1]
    width = max(STRIP, -(-size // 4))
    for start in range(0, size, width):
        strip = slice(start, start + width)
        A[:, start:, strip] += rows[:, :, start:].mT @ rows[:, :, strip]


def _sum_over_ranks(gram: Gram) -> None:
    if dist.is_initialized():
        rows = torch.tensor(gram.rows, device=gram.A.device)
        for part in (rows, gram.A, gram.BW if gram.B is None else gram.B, gram.y_square, gram.y_sum, gram.x_sum):
            dist.all_reduce(part)
        gram.rows = int(rows)


def _reorder(gram: Gram, order: Tensor) -> None:
    if torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    gram.A = gram.A[:, order][:, :, order]
    gram.x_sum = gram.x_sum[:, :, order]
    if gram.B is None:
        gram.BW = gram.BW[:, order]
    else:
        gram.B = gram.B[:, order][:, :, order]
