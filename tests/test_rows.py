"""Rows, segments and labels: what the model sees and what it has to produce."""

from __future__ import annotations

import pytest
import torch

from triptych.data.rows import RowPlan, RowSampler, SpreadPlan
from triptych.data.templates import render
from triptych.models.fusion import IMAGE
from triptych.objectives.tokens import NextToken, chunked_nll
from triptych.parts.attention import predecessors, visible
from triptych.types import IGNORE, SHARED, DataError, Sample, Tokens, TriptychError, assistant, user


def supervised(processor, sample) -> str:
    encoded = processor.encode(sample)
    return processor.tokenizer.decode([x for x in encoded.labels if x != IGNORE])


def test_labels_are_the_assistants_words_and_stop_tokens(vlm, dialogue):
    sample = dialogue(("what color?", "red"), ("is it a circle?", "no, a square"))
    assert supervised(vlm.processor(), sample) == "red<|end|>no, a square<|end|>"


def test_a_template_without_marks_gives_the_same_labels(vlm, dialogue, tokenizer):
    sample = dialogue(("what color?", "red"), ("is it a circle?", "no"))
    marked = render(sample.messages, tokenizer)
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace(
        "{% endgeneration %}", ""
    )
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = plain
    assert render(sample.messages, other) == marked


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, dialogue):
    import copy

    other = copy.copy(tokenizer)
    other.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(TriptychError, match="rewrites earlier turns"):
        render(dialogue(("a", "b"), ("c", "d")).messages, other)


def test_the_prompt_is_how_the_training_row_begins(vlm, dialogue):
    processor = vlm.processor()
    sample = dialogue(("what color is the shape?", "red"))
    encoded, prompt = processor.encode(sample), processor._encode_prompt(sample)
    whole, start = encoded.prefix + encoded.ids, prompt.prefix + prompt.ids
    assert whole[: len(start)] == start
    assert encoded.labels[len(prompt.ids)] != IGNORE


def test_nothing_to_predict_is_an_error_with_the_samples_name(vlm, pictures):
    sample = Sample([user("what?", 1)], [pictures[0]], id="row 7")
    with pytest.raises(DataError, match="row 7.*nothing to predict"):
        vlm.processor().encode(sample)


def test_images_and_places_must_agree(vlm, pictures):
    sample = Sample([user("what?", 2), assistant("red")], [pictures[0]], id="row 8")
    with pytest.raises(DataError, match="row 8.*writes 2 images.*brings 1"):
        vlm.processor().encode(sample)


def test_truncation_never_cuts_an_image(vlm, pictures):
    processor = vlm.processor()
    content = [
        {"type": "text", "text": "first"},
        {"type": "image"},
        {"type": "text", "text": "what color is it?"},
    ]
    messages = [user("hi"), assistant("yes"), {"role": "user", "content": content}]
    sample = Sample([*messages, assistant("red")], [pictures[0]], id="long")
    start = processor.encode(sample).ids.index(IMAGE)
    processor = vlm.processor()
    processor.max_length = start + 5  # in the middle of the image
    encoded = processor.encode(sample)
    assert IMAGE not in encoded.ids and encoded.images == 0 and len(encoded.ids) == start


def test_an_image_longer_than_the_row_is_refused(vlm, dialogue):
    processor = vlm.processor()
    processor.max_length = 8
    with pytest.raises(DataError, match="max_length=8"):
        processor.encode(dialogue(("a", "b")))


def test_a_row_holds_its_image_once_and_encodes_it_once(vlm, dialogue):
    samples = [dialogue(("what color?", "red"), name=f"q{i}") for i in range(3)]
    batch = vlm.processor().rows([samples])
    ids = batch.text["language"].ids
    assert (ids == IMAGE).sum() == vlm.placeholders(32, 32) == 16
    assert len(batch.images) == 1 and batch.slots.tolist() == [[0, 0, SHARED]]


def test_samples_of_different_images_do_not_share_a_row(vlm, dialogue):
    batch = vlm.processor().rows([[dialogue(("a", "b"), images=(i,), name=str(i)) for i in (0, 1)]])
    assert len(batch.text["language"].ids) == 2


def test_visibility_by_hand():
    segments = torch.tensor([[SHARED, 1, 1, 2, 0]])
    tokens = Tokens(torch.zeros_like(segments), torch.zeros_like(segments), segments)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert visible(tokens, "causal")[0].int().tolist() == expected
    assert predecessors(tokens).tolist() == [[-1, 0, 1, 0, -1]]


@pytest.mark.parametrize("images", [(0,), (0, 1), ()])
def test_packed_rows_give_the_sum_of_their_samples(vlm, dialogue, images):
    questions = [("what color is the shape?", "red"), ("circle?", "no"), ("describe", "two small")]
    samples = [dialogue(q, images=images, name=f"q{i}") for i, q in enumerate(questions)]
    samples.append(dialogue(("is there", "yes"), ("what color", "blue"), images=images, name="q3"))
    processor, objective = vlm.processor(), NextToken(chunk=3)

    def loss_and_gradients(rows):
        vlm.zero_grad()
        total = sum(objective(vlm, processor.rows(row))["next_token"].sum for row in rows)
        total.backward()
        return total, {n: p.grad.clone() for n, p in vlm.named_parameters() if p.grad is not None}

    packed, together = loss_and_gradients([[samples]])
    alone, single = loss_and_gradients([[[s]] for s in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert together.keys() == single.keys()
    for name in together:
        scale = single[name].abs().max().clamp_min(1)
        torch.testing.assert_close(together[name] / scale, single[name] / scale, rtol=0, atol=1e-5)


def test_the_loss_equals_the_librarys_own(vlm, dialogue):
    """A text-only dialogue through the library's class with labels gives the same loss."""
    sample = dialogue(("what color is the shape?", "red"), ("circle?", "no"), images=())
    processor = vlm.processor()
    encoded = processor.encode(sample)
    ids = torch.tensor([encoded.prefix + encoded.ids])
    labels = torch.tensor([[IGNORE] * len(encoded.prefix) + encoded.labels])
    theirs = vlm.language.model(input_ids=ids, labels=labels).loss
    batch = processor.collate([sample])
    objective = NextToken()
    ours = objective(vlm, batch)["next_token"].sum / objective.counts(batch)["next_token"]
    torch.testing.assert_close(ours, theirs)


def test_chunks_of_the_head_change_nothing():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    head, labels = torch.nn.Linear(6, 9).double(), torch.randint(0, 9, (11,))
    losses = [chunked_nll(head, hidden, labels, chunk) for chunk in (2, 100)]
    gradients = [torch.autograd.grad(loss, hidden)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


class Reader(list):
    clusters = ["a", "a", "b", "a", "c", "b"]


def test_row_plan_groups_by_image_and_follows_its_seed():
    reader = Reader(range(6))
    plan = RowPlan(reader, samples_per_row=2, draw=None, seed=3)
    rows = plan.rows(epoch=0)
    assert sorted(rows) == [(0, 1), (2, 5), (3,), (4,)] and len(plan) == 4
    assert rows == RowPlan(reader, 2, None, seed=3).rows(0)
    drawn = RowPlan(reader, 2, draw=1, seed=3)
    assert len(drawn) == 3 and {len(r) for r in drawn.rows(0)} == {1}


def test_ranks_split_an_epoch_without_overlap():
    reader = list(range(16))
    plan = RowPlan([Sample([], cluster=str(i)) for i in reader], 1, None, seed=0)
    batches = [list(RowSampler(plan, 2, rank=r, world=2)) for r in (0, 1)]
    rows = [row for rank in batches for batch in rank for row in batch]
    assert sorted(rows) == [(i,) for i in reader] and len(batches[0]) == len(batches[1]) == 4


def test_a_skipped_sampler_continues_the_same_epoch():
    plan = RowPlan([Sample([], cluster=str(i)) for i in range(9)], 1, None, seed=0)
    whole = list(RowSampler(plan, 2))
    resumed = RowSampler(plan, 2)
    resumed.skip = 2
    assert list(resumed) == whole[2:] and len(whole[-1]) == 1


@pytest.mark.parametrize("world", [1, 2])
def test_rows_of_one_image_never_share_a_batch_where_pairs_are_compared(world):
    clusters = [f"image {i // 7}" for i in range(210)] + ["alone"]
    plan = SpreadPlan([Sample([], cluster=c) for c in clusters], 1, None, seed=1)
    ranks = [list(RowSampler(plan, 8, rank=r, world=world)) for r in range(world)]
    batches = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
    for rows in batches:
        images = [clusters[row[0]] for row in rows]
        assert len(set(images)) == len(images)
    seen = sorted(row[0] for rows in batches for row in rows)
    if world == 1:
        assert seen == list(range(211)) and {len(rows) for rows in batches} == {7, 8}
    else:
        assert len(set(seen)) == len(seen) == 13 * 16
        assert all(len(part) == 8 for rank in ranks for part in rank)
    assert batches != [
        [r for p in parts for r in p] for parts in zip(*_next(plan, world), strict=True)
    ]


def _next(plan, world):
    samplers = [RowSampler(plan, 8, rank=r, world=world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(1)
    return [list(sampler) for sampler in samplers]


def test_an_image_with_more_rows_than_batches_leaves_some_for_another_epoch():
    plan = SpreadPlan([Sample([], cluster="a" if i < 6 else str(i)) for i in range(8)], 1, None, 0)
    batches = list(RowSampler(plan, 4))
    assert [sum(row[0] < 6 for row in rows) for rows in batches] == [1, 1]
    later = RowSampler(plan, 4)
    later.set_epoch(3)
    drawn = {row[0] for sampler in (batches, list(later)) for rows in sampler for row in rows}
    assert len(drawn & set(range(6))) > 2
