"""OSCAR: one stream of words, tags and regions; what is masked and what is polluted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from triptych.models.fusion import IMAGE, Prefix
from triptych.models.vlm import VLM
from triptych.objectives.tokens import MaskedTags
from triptych.parts.connector import RegionConnector, StateHead
from triptych.parts.masked import MaskedLanguageModel
from triptych.parts.regions import RegionFeatures
from triptych.parts.vision import VisionEncoder
from triptych.types import IGNORE, DataError, Sample, Tokens, assistant, user

BERT = {
    "model_type": "bert",
    "vocab_size": 401,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 80,
}
LOOK = {"role": "user", "content": [{"type": "image"}]}


@pytest.fixture
def oscar(tiny):
    torch.manual_seed(0)
    return VLM(
        VisionEncoder(str(tiny / "vision"), layer=-2),
        RegionConnector,
        MaskedLanguageModel(config=BERT, tokenizer=str(tiny / "language")),
        Prefix(),
        StateHead,
    )


def captions(pictures) -> list[Sample]:
    tags = [["circle"], ["square", "triangle"], ["rectangle"], ["circle"]]
    said = ["a red circle", "a blue square and a triangle", "yes", "no circle"]
    return [
        Sample([LOOK, assistant(w)], [p], tags=t, id=f"c{i}")
        for i, (w, p, t) in enumerate(zip(said, pictures, tags, strict=True))
    ]


def test_text_alone_is_the_librarys_masked_model(oscar):
    from transformers import BertForMaskedLM

    bert = oscar.language.model.eval()
    assert isinstance(bert, BertForMaskedLM)
    oscar.eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 9, 3, 0]])
    segments = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    types = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    tokens = Tokens(ids, torch.arange(4).expand(2, -1), segments, types=types)
    with torch.no_grad():
        expected = bert(ids, attention_mask=segments, token_type_ids=types).logits
        ours = oscar.language.logits(oscar.language(oscar.language.embed(tokens), tokens))
    torch.testing.assert_close(ours[segments > 0], expected[segments > 0], rtol=1e-5, atol=1e-5)


def test_regions_join_behind_the_embeddings_norm(oscar, pictures):
    """Against the reference order: embeddings of the words, then regions, then the encoder."""
    oscar.eval()
    batch = oscar.processor().collate(captions(pictures)[:1])
    tokens = batch.text["language"]
    words = int((tokens.ids[0] != IMAGE).sum())
    bert = oscar.language.model.bert
    with torch.no_grad():
        text = bert.embeddings(tokens.ids[:, :words], tokens.types[:, :words])
        regions = oscar.connector(oscar.features(batch)).tokens[None]
        expected = bert.encoder(torch.cat([text, regions], 1)).last_hidden_state
        torch.testing.assert_close(oscar(batch), expected, rtol=1e-5, atol=1e-5)


def test_only_words_and_tags_are_ever_masked(oscar, pictures):
    processor = oscar.processor()
    processor.pollution = 0.0
    samples, mask = captions(pictures), processor.tokenizer.mask_token_id
    whole = processor.collate(samples)
    processor.rate = 0.0
    plain = processor.collate(samples).text["language"].ids
    processor.rate = 1.0
    torch.manual_seed(1)
    untouched = {processor.start, processor.end, processor.tokenizer.pad_token_id, IMAGE}
    fates = {"mask": 0, "same": 0, "other": 0}
    for _ in range(60):
        tokens = processor.collate(samples).text["language"]
        fixed = torch.isin(plain, torch.tensor(sorted(untouched)))
        assert torch.equal(tokens.ids[fixed], plain[fixed])
        assert (tokens.labels[fixed] == IGNORE).all()
        assert torch.equal(tokens.labels[~fixed], plain[~fixed])  # words and tags, all of them
        now = tokens.ids[~fixed]
        fates["mask"] += int((now == mask).sum())
        fates["same"] += int((now == plain[~fixed]).sum())
        fates["other"] += int(((now != mask) & (now != plain[~fixed])).sum())
    total = sum(fates.values())
    assert abs(fates["mask"] / total - 0.8) < 0.03 and abs(fates["same"] / total - 0.1) < 0.03
    assert whole.text["language"].types[0].tolist().count(1) == len(processor._ids("circle")) + 1


def test_the_share_of_masked_tokens(oscar, pictures):
    processor = oscar.processor()
    torch.manual_seed(0)
    labels = torch.cat(
        [processor.collate(captions(pictures)).text["language"].labels.flatten() for _ in range(80)]
    )
    processor.rate = 1.0
    most = (processor.collate(captions(pictures)).text["language"].labels != IGNORE).sum()
    assert abs((labels != IGNORE).sum() / (80 * most) - 0.15) < 0.03


def test_a_polluted_row_is_flagged_and_holds_another_images_tags(oscar, pictures):
    processor = oscar.processor()
    processor.rate = 0.0
    samples = captions(pictures)
    torch.manual_seed(0)
    flagged = 0
    for _ in range(50):
        batch = processor.collate(samples)
        tokens, flags = batch.text["language"], batch.text["match"].labels[:, 0]
        for b, sample in enumerate(samples):
            said = tokens.ids[b][(tokens.types[b] == 1) & (tokens.ids[b] != processor.end)]
            own = processor._ids(" ".join(sample.tags))
            assert (said.tolist() == own) == (int(flags[b]) == 0)
            words = tokens.ids[b][(tokens.types[b] == 0) & (tokens.segments[b] == 1)]
            assert (
                processor.tokenizer.decode(words[words >= 0], skip_special_tokens=True)
                == (sample.messages[1]["content"][0]["text"])
            )
        flagged += int(flags.sum())
    assert abs(flagged / 200 - 0.5) < 0.1
    processor.pollution = 0.0
    assert int(processor.collate(samples).text["match"].labels.sum()) == 0


def test_both_terms_by_hand_and_every_tensor_learns(oscar, pictures):
    from triptych.adapt import Quantization, adapt
    from triptych.table import merge

    states = {"vision": "frozen", "connector": "full", "language": "full", "heads": "full"}
    adapt(oscar, merge(oscar, states, {}, {}), None, Quantization())
    oscar.eval()
    torch.manual_seed(0)
    batch, objective = oscar.processor().collate(captions(pictures)), MaskedTags(chunk=2)
    terms, counts = objective(oscar, batch), objective.counts(batch)
    hidden, tokens = oscar(batch), batch.text["language"]
    chances = oscar.language.logits(hidden).log_softmax(-1)
    expected = torch.zeros(())
    for b, t in (tokens.labels != IGNORE).nonzero().tolist():
        expected = expected - chances[b, t, tokens.labels[b, t]]
    torch.testing.assert_close(terms["masked"].sum, expected, rtol=1e-5, atol=1e-4)
    match = oscar.heads(hidden[:, 0]).log_softmax(-1)
    flags = batch.text["match"].labels[:, 0]
    torch.testing.assert_close(terms["tags"].sum, -match[torch.arange(4), flags].sum())
    assert counts["tags"] == 4 and counts["masked"] == int((tokens.labels != IGNORE).sum())
    sum(t.sum for t in terms.values()).backward()
    trained = {n: p for n, p in oscar.named_parameters() if p.requires_grad}
    silent = {n for n, p in trained.items() if p.grad is None or not p.grad.any()}
    assert not {n for n in silent if "key.bias" not in n}


def test_an_answer_is_filled_in_and_candidates_are_ranked_alike(oscar, pictures):
    from triptych.evaluation.model_predictor import ModelPredictor

    samples = [
        Sample(
            [user("what color?", 1), assistant("red")], [pictures[i]], tags=["circle"], id=str(i)
        )
        for i in (0, 1)
    ]
    processor = oscar.processor()
    batch = processor.collate(samples)
    tokens, mask = batch.text["language"], processor.tokenizer.mask_token_id
    assert (tokens.ids == mask).sum(1).tolist() == [4, 4]
    assert torch.equal(tokens.labels != IGNORE, tokens.ids == mask)
    assert processor.decode(tokens.labels[tokens.labels != IGNORE].view(2, 4)) == ["red", "red"]
    assert torch.equal(processor.prompts(samples).text["language"].ids, tokens.ids)
    predictor = ModelPredictor(oscar, processor)
    assert len(predictor.generate(samples)) == 2
    scores = predictor.loglikelihood(samples, [["red", "blue"], ["red", "blue"]])
    oscar.eval()
    with torch.no_grad():
        terms = MaskedTags()(oscar, batch)
    total = scores[0][0].sum + scores[1][0].sum
    assert abs(-terms["masked"].sum.item() - total) < 1e-3


def test_too_long_an_answer_is_refused(oscar, pictures):
    words = "two small circles left of a large square and a yellow triangle"
    sample = Sample([user("describe", 1), assistant(words)], [pictures[0]], id="long")
    with pytest.raises(DataError, match="long.*blanks"):
        oscar.processor().collate([sample])


def test_stored_regions_are_2054_wide_and_may_differ_in_number(tiny, tmp_path, pictures):
    generator = np.random.default_rng(0)
    for i, count in enumerate((3, 60)):
        np.savez(
            tmp_path / f"picture {i}.npz",
            features=generator.normal(size=(count, 2048)).astype("f"),
            boxes=np.tile([10.0, 20.0, 30.0, 80.0], (count, 1)),
            size=[100, 200],
        )
    vision = RegionFeatures(str(tmp_path))
    assert vision.dim == 2054
    language = MaskedLanguageModel(config=BERT, tokenizer=str(tiny / "language"))
    model = VLM(vision, RegionConnector, language, Prefix(), partial(StateHead, classes=2))
    batch = model.processor().collate(captions(pictures)[:2])
    assert batch.images.features.counts.tolist() == [3, 50]
    assert (batch.text["language"].ids == IMAGE).sum(1).tolist() == [3, 50]
    position = batch.images.features.tokens[0, -6:]
    torch.testing.assert_close(position, torch.tensor([0.05, 0.2, 0.15, 0.8, 0.1, 0.6]))
    assert torch.isfinite(MaskedTags()(model, batch)["tags"].sum)
    with pytest.raises(DataError, match="picture 3.npz.*do not exist"):
        model.processor().collate(captions(pictures)[3:])
