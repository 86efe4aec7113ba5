"""Packs codes (whole numbers from 0 to levels - 1) into bytes, using about log2(levels) bits for each."""

import torch
from torch import Tensor

_WORD = 63  # bits; a word fits a non-negative int64


def _bits_for(values: int) -> int:
    """Bits that tell `values` different values apart."""
    return (values - 1).bit_length()


def word_layout(levels: int) -> tuple[int, int]:
    """Group codes into words so that the fewest bits are lost: five levels go as three base-5 digits into 7 bits.

    Args:
        levels: Number of values a code can take, at least 2.

    Returns:
        Digits (base `levels`) in a word and bits of that word, at most 63; of equally good groups the smallest.
    """
    candidates = ((digits, _bits_for(levels**digits)) for digits in range(1, _WORD + 1))
    return min((word for word in candidates if word[1] <= _WORD), key=lambda word: word[1] / word[0])


def packed_size(count: int, levels: int) -> int:
    """Bytes that `count` codes of `levels` values take; the last word is cut where its digits end."""
    digits, bits = word_layout(levels)
    words, rest = divmod(count, digits)
    return -(-(words * bits + _bits_for(levels**rest)) // 8)


def pack_codes(codes: Tensor, levels: int) -> Tensor:
    """Pack integer codes in [0, levels) of any shape into bytes, lowest digit and lowest bit first.

    Returns:
        uint8, (packed_size(codes.numel(), levels),).
    """
    digits, bits = word_layout(levels)
    words = -(-codes.numel() // digits)
    digit_table = torch.zeros(words * digits, dtype=torch.int64)
    digit_table[: codes.numel()] = codes.detach().flatten().cpu()
    values = (digit_table.view(words, digits) * _powers(levels, digits)).sum(1)
    stream = torch.zeros(-(-words * bits // 8) * 8, dtype=torch.uint8)
    for bit, column in enumerate(stream[: words * bits].view(words, bits).unbind(1)):
        column.copy_(values >> bit & 1)
    packed = (stream.view(-1, 8) * _powers(2, 8).to(torch.uint8)).sum(1, dtype=torch.uint8)
    return packed[: packed_size(codes.numel(), levels)]


def unpack_codes(packed: Tensor, count: int, levels: int) -> Tensor:
    """Undo `pack_codes`: int16 codes, (count,)."""
    digits, bits = word_layout(levels)
    words = -(-count // digits)
    data = torch.zeros(-(-words * bits // 8), dtype=torch.uint8)
    data[: packed.numel()] = packed
    stream = (data.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten()
    values = torch.zeros(words, dtype=torch.int64)
    for bit, column in enumerate(stream[: words * bits].view(words, bits).unbind(1)):
        values |= column.long() << bit
    codes = values.unsqueeze(1) // _powers(levels, digits) % levels
    return codes.flatten()[:count].to(torch.int16)


def _powers(base: int, count: int) -> Tensor:
    return torch.tensor([base**exponent for exponent in range(count)])
