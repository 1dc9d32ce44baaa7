"""A mask against its dense definition."""

import pytest
import torch

from mmkernels.ops.attention import tiles

__all__ = ["check"]


def check(mask, expected):
    """A mask equals the dense one; no visible pair lies outside its key's hull or in a skipped tile."""
    tokens_q, tokens_k = expected.shape
    assert torch.equal(mask.to_dense(tokens_q, tokens_k), expected)
    assert mask.density(tokens_q, tokens_k) == pytest.approx(expected.double().mean().item() if expected.numel() else 0)
    rows = mask.rows(tokens_q, tokens_k)
    query = torch.arange(tokens_q)[:, None]
    assert not (expected & ((query < rows.first_q[None]) | (query >= rows.last_q[None]))).any()
    check_tiles(rows, expected, 4, 3)
    assert (rows.tiles is not None) == (rows.span_q is not None)
    if rows.tiles is not None:
        word = torch.arange(rows.tiles.shape[1] * 16)
        unpacked = rows.tiles[:, word // 16] >> 2 * (word % 16) & 3
        states = tiles.tile_states(rows, tokens_k)
        assert torch.equal(unpacked[:, : states.shape[1]], states)
        assert not unpacked[:, states.shape[1] :].any()


def check_tiles(rows, expected, tile_q, tile_k):
    """A SKIP tile has no visible pair, a FULL tile no hidden one; most tiles that qualify are found."""
    states = tiles.tile_states(rows, expected.shape[1], tile_q, tile_k)
    for a in range(states.shape[0]):
        for b in range(states.shape[1]):
            block = expected[a * tile_q : (a + 1) * tile_q, b * tile_k : (b + 1) * tile_k]
            if states[a, b] == tiles.SKIP:
                assert not block.any()
            if states[a, b] == tiles.FULL:
                assert block.all()
                assert block.shape[1] == tile_k
