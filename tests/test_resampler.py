"""Qwen-VL's resampler: a fixed grid of tokens that knows where it looks."""

from __future__ import annotations

import pytest
import torch

from triptych.parts.resampler import Resampler, resized, sine_positions
from triptych.types import ImageFeatures, TriptychError


def features(*counts: int) -> ImageFeatures:
    return ImageFeatures(torch.randn(sum(counts), 12), torch.tensor(counts))


@pytest.mark.parametrize("patches", [1, 9, 256, 1024])
def test_any_image_gives_256_tokens(patches):
    connector = Resampler(12, 32, head_dim=8)
    out = connector(features(patches))
    assert out.tokens.shape == (256, 32) and connector.num_tokens(patches) == 256


def test_images_of_different_sizes_share_a_batch():
    torch.manual_seed(0)
    connector = Resampler(12, 32, side=4, head_dim=8).eval()
    both = features(9, 16)
    alone = [
        connector(ImageFeatures(t, torch.tensor([len(t)]))) for t in both.tokens.split([9, 16])
    ]
    together = connector(both)
    assert together.counts.tolist() == [16, 16]
    torch.testing.assert_close(together.tokens, torch.cat([a.tokens for a in alone]))


def test_a_grid_that_is_not_square_is_refused():
    with pytest.raises(TriptychError, match="square grid.*257"):
        Resampler(12, 32, side=4, head_dim=8).num_tokens(257)


def test_positions_by_hand():
    """Column first: entry [row 1, column 2] holds sin(2), cos(2), then sin(1), cos(1)."""
    at = sine_positions(3, 3, 4)[1 * 3 + 2]
    angles = torch.tensor([2.0, 2.0, 1.0, 1.0])
    expected = torch.stack([angles[0].sin(), angles[1].cos(), angles[2].sin(), angles[3].cos()])
    torch.testing.assert_close(at, expected)
    assert torch.equal(resized(sine_positions(3, 3, 4), 9), sine_positions(3, 3, 4))


def test_where_a_patch_stands_matters_and_values_carry_no_position():
    torch.manual_seed(0)
    connector = Resampler(12, 32, side=2, head_dim=8).eval()
    image = features(16)
    moved = ImageFeatures(image.tokens.roll(1, 0), image.counts)
    assert (connector(image).tokens - connector(moved).tokens).abs().max() > 1e-4
    connector.positions.zero_()  # without positions a set of patches is a set
    torch.testing.assert_close(connector(image).tokens, connector(moved).tokens)


def test_one_layer_against_the_textbook_formula():
    torch.manual_seed(0)
    connector = Resampler(12, 8, side=2, head_dim=4).eval()
    image = features(4)
    kv = connector.ln_kv(connector.kv_proj(image.tokens))
    q = connector.ln_q(connector.queries) + connector.positions
    k = kv + connector.positions
    weight, bias = connector.attn.in_proj_weight.chunk(3), connector.attn.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, kv), weight, bias, strict=True))
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[:, h] @ k[:, h].T / 4**0.5).softmax(-1) @ v[:, h])
    mixed = connector.attn.out_proj(torch.cat(heads, 1))
    torch.testing.assert_close(connector(image).tokens, connector.ln_post(mixed) @ connector.proj)
