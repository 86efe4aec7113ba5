"""Draws that depend on counters alone."""

import torch

from kdq_lightning.quantization.draws import draw_positions, draw_uniform


def test_draws_do_not_depend_on_the_shard():
    whole = draw_positions(0, 2, torch.arange(40), 10, 64)
    assert torch.equal(whole[13:29], draw_positions(0, 2, torch.arange(13, 29), 10, 64))
    assert not torch.equal(whole, draw_positions(0, 3, torch.arange(40), 10, 64))
    assert not torch.equal(whole, draw_positions(1, 2, torch.arange(40), 10, 64))


def test_draws_are_distinct_and_even():
    positions = draw_positions(0, 0, torch.arange(4000), 7, 30)
    assert all(len(set(row)) == 7 for row in positions.tolist()[:200])
    counts = positions.flatten().bincount(minlength=30) / 4000
    assert counts.min() > 0.17 and counts.max() < 0.28  # 7/30 = 0.233, runs are 4 or 5 long
    assert torch.equal(draw_positions(0, 0, torch.arange(3), 30, 30), torch.arange(30).expand(3, 30))


def test_draws_with_replacement_are_uniform():
    positions = draw_positions(0, 0, torch.arange(4000), 7, 30, replacement=True)
    counts = positions.flatten().bincount(minlength=30) / 28000
    assert (counts - 1 / 30).abs().max() < 0.005
    assert any(len(set(row)) < 7 for row in positions.tolist())


def test_noise_is_uniform():
    noise = draw_uniform(0, 0, 200, 100)
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(float(noise.mean()) - 0.5) < 0.01
