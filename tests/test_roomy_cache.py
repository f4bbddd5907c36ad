"""A cache with room gives what the library's growing cache gives, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from triptych.parts import roomy_cache
from triptych.parts.roomy_cache import RoomyLayer, with_room


def filled() -> DynamicCache:
    made = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    for layer in range(2):
        states = torch.randn(2, 3, 4, 5, 8, generator=made)
        cache.update(states[0], states[1], layer)
    return cache


def grow(cache: DynamicCache, seed: int, new: int = 1) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(2):
        rows = cache.layers[layer].keys.shape[0]
        states = torch.randn(2, rows, 4, new, 8, generator=made)
        found += [t.clone() for t in cache.update(states[0], states[1], layer)]
    return found


STEPS = {
    "beams": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "chosen rows": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "repeated rows": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-2),
    "nothing": lambda cache: None,
}


@pytest.mark.parametrize("room", [0, 1, 3, 64])
@pytest.mark.parametrize("step", STEPS)
def test_it_holds_what_the_growing_cache_holds(step, room, monkeypatch):
    monkeypatch.setattr(roomy_cache, "ROOM", room)
    plain, roomy = filled(), with_room(filled())
    assert all(type(layer) is RoomyLayer for layer in roomy.layers)
    for seed in range(4):
        for one, other in zip(grow(plain, seed), grow(roomy, seed), strict=True):
            assert torch.equal(one, other)
    STEPS[step](plain)
    STEPS[step](roomy)
    for seed in range(4, 8):
        for one, other in zip(grow(plain, seed, 2), grow(roomy, seed, 2), strict=True):
            assert torch.equal(one, other)
    assert plain.get_seq_length() == roomy.get_seq_length()


def test_a_new_token_copies_nothing_that_is_kept():
    cache = with_room(filled())
    first, second = grow_in_place(cache), grow_in_place(cache)
    assert first == second


def grow_in_place(cache: DynamicCache) -> list[int]:
    grow(cache, 0)
    return [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)]


def test_layers_with_rules_of_their_own_are_left_alone():
    from transformers import MistralConfig

    sizes = {"num_hidden_layers": 2, "sliding_window": 4}
    cache = DynamicCache(config=MistralConfig(**sizes))
    before = [type(layer) for layer in cache.layers]
    assert [type(layer) for layer in with_room(cache).layers] == before


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
def test_answers_are_those_of_the_growing_cache(vlm, dialogue, monkeypatch, more):
    from triptych.evaluation.model_predictor import ModelPredictor

    samples = [dialogue((f"what color {i}?", "red"), name=f"q{i}") for i in range(5)]

    def answers() -> list[str]:
        predictor = ModelPredictor(vlm, vlm.processor())
        return predictor.generate(samples, max_new_tokens=12, **more)

    with monkeypatch.context() as patch:
        patch.setattr(roomy_cache, "with_room", lambda cache: cache)
        expected = answers()
    calls, update = [], RoomyLayer.update
    monkeypatch.setattr(RoomyLayer, "update", lambda *a: calls.append(1) or update(*a))
    monkeypatch.setattr(roomy_cache, "ROOM", 4)
    assert answers() == expected
    assert calls
