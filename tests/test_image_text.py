"""BLIP and BLIP-2 stage 1: parity with the library's heads, and the three terms by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from triptych.interop import blip
from triptych.models.fusion_encoder import FusionEncoder, MatchHeads
from triptych.models.momentum import Momentum
from triptych.objectives.image_text import ImageText, draw_negatives, similarity
from triptych.objectives.tokens import NextToken
from triptych.parts.cross_text import CrossText
from triptych.parts.qformer import PairQFormer
from triptych.parts.vision import VisionEncoder
from triptych.types import IGNORE, Batch, Images, Sample, Tokens, TriptychError, assistant, user

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "encoder_hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
QFORMER = {k: TEXT[k] for k in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "encoder_hidden_size": 16,
    "use_qformer_text_input": True,
}


def reference(kind: str, attention: str = "eager"):
    import transformers

    if kind.startswith("Blip2"):
        config = transformers.Blip2Config(
            vision_config=VISION, qformer_config=QFORMER, num_query_tokens=3
        )
        config.image_token_index = None
        config.image_text_hidden_size = 8
    else:
        config = transformers.BlipConfig(
            vision_config=VISION, text_config=TEXT, image_text_hidden_size=8
        )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    model.vision_model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tokens_of(rows: list[list[int]]) -> Tokens:
    ids = torch.tensor(rows)
    labels = ids.masked_fill(ids == 0, IGNORE)
    labels[:, 0] = IGNORE
    return Tokens(ids, torch.arange(ids.shape[1]).expand_as(ids), (ids != 0).long(), labels)


def pixels() -> Images:
    return Images(["a", "b"], torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))


SLOTS = torch.tensor([[0, 0, 1], [1, 1, 1]])
READ = tokens_of([[5, 7, 9, 2], [6, 8, 2, 0]])


@pytest.mark.parametrize("kind", ["BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_embeddings_and_matching_are_the_librarys(kind, attention):
    theirs = reference(kind, attention)
    ours = blip.from_hf(kind, theirs.config, theirs.state_dict(), implementation=attention).eval()
    images = pixels()
    batch = Batch(images, SLOTS, {"text": READ}, [])
    inputs = {
        "pixel_values": ours.vision.transform.normalize(images.pixels),
        "input_ids": READ.ids,
        "attention_mask": READ.mask.long(),
    }
    flag = "use_image_text_matching_head" if kind.startswith("Blip2") else "use_itm_head"
    with torch.no_grad():
        compared = similarity(ours.embed_images(images), ours.embed_texts(READ))
        expected, matched = theirs(**inputs, **{flag: False}), theirs(**inputs, **{flag: True})
        second = kind.startswith("Blip2")
        scores = expected.logits_per_image if second else expected.itm_score
        pairs = matched.logits_per_image if second else matched.itm_score
        torch.testing.assert_close(compared, scores, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.match(batch), pairs, rtol=1e-5, atol=1e-5)


@pytest.fixture
def words(tiny):
    return str(tiny / "language")


def test_captions_are_the_librarys(words, tokenizer):
    kind = "BlipForConditionalGeneration"
    theirs = reference(kind)
    ours = blip.from_hf(kind, theirs.config, theirs.state_dict(), tokenizer=words).eval()
    ours.connector.set_tokenizer(words, None, 400, 40)
    images = pixels()
    batch = Batch(images, SLOTS, {"decoder": tokens_of([[1, 7, 9, 2], [1, 8, 2, 0]])}, [])
    values = ours.vision.transform.normalize(images.pixels)
    with torch.no_grad():
        decoder = batch.text["decoder"]
        expected = theirs(
            pixel_values=values, input_ids=decoder.ids, attention_mask=decoder.mask.long()
        ).logits
        torch.testing.assert_close(ours.logits(ours(batch)), expected, rtol=1e-5, atol=1e-5)
        beginnings = Batch(images, SLOTS, {"decoder": tokens_of([[1, 7], [1, 9]])}, [])
        said = theirs.text_decoder.generate(
            input_ids=beginnings.text["decoder"].ids,
            encoder_hidden_states=theirs.vision_model(values).last_hidden_state,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        cached = ours.generate(beginnings, max_new_tokens=6)
        assert torch.equal(cached, said[:, 2:])
        again = ours.generate(beginnings, max_new_tokens=6, use_cache=False)
        assert torch.equal(cached, again)


def test_answers_are_written_over_the_question_as_in_the_library():
    kind = "BlipForQuestionAnswering"
    theirs = reference(kind)
    ours = blip.from_hf(kind, theirs.config, theirs.state_dict()).eval()
    images = pixels()
    answer = tokens_of([[1, 7, 2], [1, 8, 2]])
    batch = Batch(images, SLOTS, {"question": READ, "decoder": answer}, [])
    values = ours.vision.transform.normalize(images.pixels)
    with torch.no_grad():
        image = theirs.vision_model(values).last_hidden_state
        question = theirs.text_encoder(
            READ.ids, READ.mask.long(), encoder_hidden_states=image
        ).last_hidden_state
        expected = theirs.text_decoder(
            answer.ids,
            attention_mask=answer.mask.long(),
            encoder_hidden_states=question,
            encoder_attention_mask=READ.mask.long(),
        ).logits
        torch.testing.assert_close(ours.logits(ours(batch)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(blip.LAYOUTS))
def test_export_gives_back_every_tensor(kind):
    theirs = reference(kind)
    state = theirs.state_dict()
    back = blip.to_hf(kind, blip.from_hf(kind, theirs.config, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_decoder_shares_everything_but_self_attention():
    part = CrossText(16, None, {k: v for k, v in TEXT.items() if k != "encoder_hidden_size"})
    one, two = part.encoder, part.decoder.bert

    def place(module):
        return [p.data_ptr() for p in module.parameters()]

    assert place(one.embeddings) == place(two.embeddings)
    for mine, other in zip(two.encoder.layer, one.encoder.layer, strict=True):
        for name in ("crossattention", "intermediate", "output"):
            assert place(getattr(mine, name)) == place(getattr(other, name))
        assert not set(place(mine.attention)) & set(place(other.attention))
    word_table = one.embeddings.word_embeddings.weight
    assert part.decoder.cls.predictions.decoder.weight is word_table


def make(tiny, kind: str, momentum=None) -> FusionEncoder:
    torch.manual_seed(0)
    vision = VisionEncoder(str(tiny / "vision"), layer=-2, select="cls_patch")
    settings = {"tokenizer": str(tiny / "language"), "max_length": 12}
    if kind == "blip":
        config = TEXT | {"vocab_size": 410}
        del config["encoder_hidden_size"]
        starts = {"match": "[ENC]", "write": "[DEC]"}
        connector = partial(CrossText, config=config, starts=starts, **settings)
    else:
        config = QFORMER | {"vocab_size": 410}
        connector = partial(
            PairQFormer, queries=3, config=config, reader={"starts": {"write": "[DEC]"}, **settings}
        )
    return FusionEncoder(vision, connector, partial(MatchHeads, dim=8), momentum)


def captions(pictures, names=(0, 1, 2)) -> list[Sample]:
    said = ["red circle", "a blue square, teal", "yellow"]
    look = {"role": "user", "content": [{"type": "image"}]}
    return [
        Sample([look, assistant(said[i % 3])], [pictures[i]], id=f"c{i}", cluster=str(i))
        for i in names
    ]


def test_rows_begin_with_their_use_and_labels_leave_the_start_out(tiny, pictures):
    processor = make(tiny, "blip").processor()
    batch = processor.collate(captions(pictures))
    text, decoder, part = batch.text["text"], batch.text["decoder"], processor.part
    assert decoder.ids[:, 0].tolist() == [part.start_id("write")] * 3
    assert part.start_id("write") != part.start_id("match") != part.start_id("read")
    assert torch.equal(text.ids[:, 1:], decoder.ids[:, 1:])
    assert (decoder.labels[:, 0] == IGNORE).all()
    assert processor.decode(decoder.labels.clamp_min(0))[0] == "red circle"
    assert (decoder.labels != IGNORE).sum() == (text.mask.sum() - 3)


def test_a_question_is_never_its_answer(tiny, pictures):
    model = make(tiny, "blip")
    samples = [Sample([user("what color?", 1), assistant("red")], [pictures[0]], id="q")]
    batch = model.processor().collate(samples)
    assert set(batch.text) == {"question", "decoder"}
    with pytest.raises(TriptychError, match="captions"):
        ImageText().counts(batch)
    answers = model.processor().prompts(samples)
    assert torch.equal(answers.text["question"].ids, batch.text["question"].ids)


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_itc_without_a_teacher_by_hand(tiny, pictures, kind):
    model = make(tiny, kind).eval()
    batch = model.processor().collate(captions(pictures))
    images = model.embed_images(batch.images)[batch.slots[:, 0]]  # (B,K,E)
    texts = model.embed_texts(batch.text["text"])
    expected = 0.0
    for b in range(3):
        row = torch.stack([max(k @ texts[j] for k in images[b]) for j in range(3)])
        column = torch.stack([max(k @ texts[b] for k in images[j]) for j in range(3)])
        for scores in (row, column):
            chances = (scores / 0.07).log_softmax(0)
            expected -= (0.9 * chances[b] + 0.1 * chances.mean()) / 2
    ours = ImageText(smoothing=0.1).contrast(model, batch, images, texts)
    torch.testing.assert_close(ours, expected)


def test_soft_targets_of_the_teacher_by_hand(tiny, pictures):
    model = make(tiny, "blip", partial(Momentum, queue=5)).eval()
    batch = model.processor().collate(captions(pictures))
    objective = ImageText(soft=0.4, ramp=2.0)
    objective.progress = 1.0  # half way up: 0.2
    images = model.embed_images(batch.images)[batch.slots[:, 0]]
    texts = model.embed_texts(batch.text["text"])
    slow_images, slow_texts = model.teach(batch)
    torch.testing.assert_close(slow_images, images[:, 0])  # before the first step they are equal
    expected = 0.0
    for fast, slow, bank in (
        (images[:, 0], slow_images, torch.cat([slow_texts, model.momentum.texts])),
        (texts, slow_texts, torch.cat([slow_images, model.momentum.images])),
    ):
        for b in range(3):
            goal = 0.2 * (bank @ slow[b] / 0.07).softmax(0)
            goal[b] += 0.8
            expected -= (goal * (bank @ fast[b] / 0.07).log_softmax(0)).sum() / 2
    torch.testing.assert_close(objective.contrast(model, batch, images, texts), expected)


def test_a_negative_is_never_of_the_same_image():
    torch.manual_seed(0)
    keys = torch.tensor([0, 0, 1, 2])
    same = keys[:, None] == keys
    scores = torch.eye(4) * 50  # the positive is by far the most similar
    drawn = torch.stack([draw_negatives(scores, same) for _ in range(200)])
    assert not same[torch.arange(4).expand(200, -1), drawn].any()
    assert set(drawn[:, 0].tolist()) == {2, 3}
    with pytest.raises(TriptychError, match="batch_size"):
        draw_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))


def test_hard_negatives_prefer_what_is_similar():
    torch.manual_seed(0)
    scores = torch.tensor([[9.0, 3.0, 0.0]]).repeat(500, 1)
    same = torch.tensor([[True, False, False]]).repeat(500, 1)
    weights = scores.softmax(1)[0, 1:] + 1e-4
    share = (draw_negatives(scores, same) == 1).float().mean()
    torch.testing.assert_close(share, weights[0] / weights.sum(), rtol=0, atol=0.05)


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_matching_counts_one_positive_to_two_negatives(tiny, pictures, kind, monkeypatch):
    model = make(tiny, kind).eval()
    batch = model.processor().collate(captions(pictures))
    seen = []
    whole = model.match_logits

    def spy(states, real, tokens):
        seen.append((states, tokens))
        return whole(states, real, tokens)

    monkeypatch.setattr(model, "match_logits", spy)
    objective = ImageText()
    terms, counts = objective(model, batch), objective.counts(batch)
    states, tokens = seen[0]
    assert len(states) == len(tokens.ids) == counts["itm"] == 9
    true = batch.text["text"].ids
    assert torch.equal(tokens.ids[:3], true) and torch.equal(tokens.ids[3:6], true)
    assert (tokens.ids[6:] != true).any(1).all()  # another text for the same image
    assert torch.equal(states[6:], states[:3])
    assert all((states[3 + b] != states[b]).any() for b in range(3))
    assert set(terms) == set(counts) == {"itc", "itm", "lm"}


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_lm_term_is_the_smoothed_cross_entropy_of_the_text(tiny, pictures, kind):
    model = make(tiny, kind).eval()
    batch = model.processor().collate(captions(pictures))
    del batch.text["text"]
    decoder = batch.text["decoder"]
    logits = model.logits(model(batch))
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        decoder.labels[:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=0.1,
    )
    states, real = model.states(batch.images)
    ours = ImageText().describing(model, batch, (states[batch.slots[:, 0]], real))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    plain = NextToken()
    theirs = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), decoder.labels[:, 1:].flatten(), ignore_index=IGNORE
    )
    mean = plain(model, batch)["next_token"].sum / plain.counts(batch)["next_token"]
    torch.testing.assert_close(mean, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_every_trained_tensor_gets_a_gradient_and_the_tower_none(tiny, pictures, kind):
    from triptych.adapt import Quantization, adapt
    from triptych.table import merge

    model = make(tiny, kind, partial(Momentum, queue=7) if kind == "blip" else None)
    vision = "full" if kind == "blip" else "frozen"
    states = {"vision": vision, "connector": "full", "heads": "full", "momentum": "ema"}
    adapt(model, merge(model, states, {}, {}), None, Quantization())
    batch = model.processor().collate(captions(pictures))
    sum(t.sum for t in ImageText()(model, batch).values()).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    silent = {n for n, p in trained.items() if not p.grad.any()}
    assert not {n for n in silent if "key.bias" not in n and "k_proj.bias" not in n}
    assert all(n.startswith("vision.") == (kind == "blip") for n in trained if "vision.model" in n)
    assert not any(n.startswith("momentum.") for n in trained)


def test_the_queue_wraps_and_the_teacher_follows_without_gradient(tiny, pictures):
    model = make(tiny, "blip", partial(Momentum, queue=5, rate=0.9)).train()
    teacher = model.momentum
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.vision.training
    before = teacher.images.clone()
    batch = model.processor().collate(captions(pictures))
    ImageText()(model, batch)
    noted = teacher._pending[0].clone()
    name = "decoder.bert.encoder.layer.0.attention.self.query.weight"
    student = model.connector.get_parameter(name)
    with torch.no_grad():
        student.add_(1.0)
    expected = 0.9 * teacher.connector.get_parameter(name) + 0.1 * student
    model.after_step(batch)
    torch.testing.assert_close(teacher.connector.get_parameter(name), expected.detach())
    assert int(teacher.place) == 3
    assert torch.equal(teacher.images[:3], noted) and torch.equal(teacher.images[3:], before[3:])
    ImageText()(model, batch)
    second = teacher._pending[0].clone()
    model.after_step(batch)
    assert int(teacher.place) == 1  # 6 rows in a queue of 5
    assert torch.equal(teacher.images[3:], second[:2])
    assert torch.equal(teacher.images[0], second[2])
    assert torch.equal(teacher.images[1:3], noted[1:])


def test_a_tied_tensor_is_blended_once(tiny):
    model = make(tiny, "blip", partial(Momentum, queue=5, rate=0.5))
    teacher = model.momentum
    name = "encoder.embeddings.word_embeddings.weight"
    own = teacher.connector.get_parameter(name).detach().clone()
    with torch.no_grad():
        model.connector.get_parameter(name).add_(1.0)
    teacher.step(model._student())
    torch.testing.assert_close(teacher.connector.get_parameter(name), own + 0.5)


def test_checkpoints_hold_teacher_and_queue(tiny):
    from triptych.adapt import Quantization, adapt, frozen_tensors
    from triptych.lit import saved_names
    from triptych.table import merge

    model = make(tiny, "blip", partial(Momentum, queue=5))
    table = merge(model, {"*": "full", "momentum": "ema"}, {"*": "full"}, {})
    adapt(model, table, None, Quantization())
    assert not any(p.requires_grad for p in model.momentum.parameters())
    assert not [n for n, _ in frozen_tensors(model) if n.startswith("momentum.")]
    names = saved_names(model)
    assert {"momentum.images", "momentum.texts", "momentum.place"} <= names
    assert any(n.startswith("momentum.connector.encoder.") for n in names)


def test_scale_stays_within_its_bounds(tiny):
    model = make(tiny, "blip")
    for start, kept in ((100.0, 1000.0), (-100.0, 2.0)):
        model.heads.logit_scale.data.fill_(start)
        model.after_step(None)
        torch.testing.assert_close(model.heads.logit_scale.exp(), torch.tensor(kept))


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_generation_of_a_batch_is_that_of_its_rows(tiny, pictures, kind):
    model = make(tiny, kind).eval()
    processor = model.processor()
    samples = captions(pictures)
    both = model.generate(processor.prompts(samples), max_new_tokens=5)
    for b, sample in enumerate(samples):
        alone = model.generate(processor.prompts([sample]), max_new_tokens=5)[0]
        assert torch.equal(both[b, : len(alone)], alone)
    assert len(processor.decode(both)) == 3
