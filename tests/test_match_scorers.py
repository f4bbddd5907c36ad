"""The match scorers: shortlist by cosine, re-ranked by the head, each image encoded once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.embedding import RetrievalBenchmark
from triptych.evaluation.matching import Match, MatchRetrieve
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.runner import evaluate
from triptych.models.fusion_encoder import FusionEncoder, MatchHeads
from triptych.parts.cross_text import CrossText
from triptych.parts.qformer import PairQFormer
from triptych.parts.vision import VisionEncoder
from triptych.types import Batch, Sample, assistant, user

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}


def fusion(kind: str, tiny, vocabulary: int) -> FusionEncoder:
    torch.manual_seed(3)
    config = TEXT | {"vocab_size": vocabulary + 2}
    reader = {"tokenizer": str(tiny / "language"), "max_length": 32, "starts": {"write": "[DEC]"}}
    if kind == "blip":
        part = partial(CrossText, config=config, **reader)
    else:
        part = partial(PairQFormer, config=config, queries=3, reader=reader)
    vision = VisionEncoder(str(tiny / "vision"), layer=-1, select="cls_patch")
    model = FusionEncoder(vision, part, partial(MatchHeads, dim=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=["blip", "qformer"])
def model(request, tiny, tokenizer):
    return fusion(request.param, tiny, len(tokenizer))


CAPTIONS = ["a red circle", "is there a circle?", "two small circles", "yes", "a blue square"]


def test_match_is_the_models_own_and_no_batch_size_changes_it(model, pictures):
    refs = [pictures[i] for i in (2, 0, 2, 1, 0)]
    processor = model.processor()
    expected = []
    for ref, caption in zip(refs, CAPTIONS, strict=True):
        images, _ = processor.images([Sample([], [ref])])
        tokens = processor.part.encode([caption], use="match")
        batch = Batch(images, torch.tensor([[0, 0, 1]]), {"text": tokens}, [])
        with torch.no_grad():
            expected.append(model.match(batch))
    for size in (1, 2, 16):
        predictor = ModelPredictor(model, processor, batch_size=size)
        found = predictor.match(refs, CAPTIONS)
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
        assert predictor.vision_calls == 3, "each distinct image is encoded once"
    assert {"match", "embed", "caption"} <= predictor.capabilities
    assert "sentences" not in predictor.capabilities
    asked = hasattr(model.connector, "question")  # a Q-Former reads no question
    assert ("generate" in predictor.capabilities) == asked


def test_embeddings_of_a_model_that_also_matches(model):
    predictor = ModelPredictor(model, model.processor(), batch_size=2)
    rows = predictor.embed_texts(CAPTIONS)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(rows[3:4], predictor.embed_texts(["yes"]), rtol=1e-4, atol=1e-5)


def test_a_match_encodes_each_image_once_for_cosine_and_head(model, pictures):
    samples = [asked(pictures[i % 3], "yes", ["yes", "no"], f"q{i}") for i in range(7)]
    outcomes = []
    for size in (2, 16):
        predictor = ModelPredictor(model, model.processor(), batch_size=size)
        outcomes.append(Match(k_test=1).ask(predictor, samples))
        assert predictor.vision_calls == 3
        predictor.match([pictures[0]], ["yes"])
        assert predictor.vision_calls == 4, "nothing is kept behind the scorer: weights may change"
    few, many = (np.array([o.scores for o in found]) for found in outcomes)
    np.testing.assert_allclose(few, many, atol=1e-4)


class Head:
    """Cosines and match logits written down: image i against caption j."""

    batch_size, vision_calls, generated_tokens = 4, 0, 0
    capabilities = frozenset({"embed", "match"})

    def __init__(self, cosine, logits, captions):
        self.cosine, self.logits, self.captions = np.array(cosine), np.array(logits), captions
        self.read: list[tuple[int, int]] = []

    def embed_images(self, refs):
        rows = [self.cosine[int(ref.name.split()[1])] for ref in refs]
        return torch.tensor(np.array(rows), dtype=torch.float32)[:, None]

    def embed_texts(self, texts):
        return torch.eye(len(self.captions))[[self.captions.index(t) for t in texts]]

    def match(self, refs, texts):
        pairs = [
            (int(r.name.split()[1]), self.captions.index(t))
            for r, t in zip(refs, texts, strict=True)
        ]
        self.read += pairs
        return torch.tensor([[0.0, self.logits[i][j]] for i, j in pairs])


def asked(ref, gold, candidates, name="q", **meta):
    messages = [user("which?", images=1), assistant(gold)]
    return Sample(messages, [ref], gold, list(candidates), id=name, cluster=ref.key, meta=meta)


def test_the_head_decides_within_the_shortlist_alone(pictures):
    words = ["which? a", "which? b", "which? c"]
    head = Head([[0.9, 0.8, 0.1]], [[-1.0, 2.0, 50.0]], words)
    sample = asked(pictures[0], "b", "abc")
    (outcome,) = Match(k_test=2).ask(head, [sample])
    assert outcome.parsed == "b" and head.read == [(0, 0), (0, 1)]
    np.testing.assert_allclose(outcome.scores, [-0.1, 2.8, -2.0], atol=1e-6)  # -0.1 - 2 + 0.1
    (every,) = Match(k_test=9).ask(head, [sample])
    assert every.parsed == "c" and every.scores[2] == pytest.approx(50.1, abs=1e-5)


def test_own_captions_stand_for_the_candidates(pictures):
    head = Head([[0.1, 0.2]], [[3.0, 1.0]], ["a dog", "no dog"])
    sample = asked(pictures[0], "yes", ["yes", "no"], captions=["a dog", "no dog"])
    benchmark = AnswerBenchmark([sample], scorers=[Match()])
    entry = evaluate(head, {"b": benchmark}, None, blind="none", progress=False)
    entry = entry["metrics"]["b/accuracy"]
    assert (entry["value"], entry["scorer"]) == (1.0, "match")


def test_retrieval_is_reranked_and_its_ceiling_counts_the_shortlist(pictures):
    captions = ["a", "b", "c"]
    cosine = [[0.5, 0.6, 0.0], [0.1, 0.7, 0.2], [0.9, 0.3, 0.2]]
    logits = [[9.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 9.0]]
    samples = [
        Sample([user("", 1), assistant(c)], [pictures[i]], id=c, cluster=c)
        for i, c in enumerate(captions)
    ]
    head = Head(cosine, logits, captions)
    metrics = evaluate(
        head, {"b": RetrievalBenchmark(samples, [MatchRetrieve(k_test=2)])}, None, progress=False
    )["metrics"]
    # images: 0 lists b, a and 1 lists b, c: both put right; 2 lists a, b, so c is lost
    assert (
        metrics["b/i2t_r1"]["value"]
        == metrics["b/i2t_r1"]["ceiling"]
        == pytest.approx(2 / 3, abs=1e-6)
    )
    assert metrics["b/i2t_r10"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    # captions: a lists 2, 0; b lists 1, 0; c lists 1, 2
    assert metrics["b/t2i_r1"]["value"] == 1.0 and metrics["b/t2i_r1"]["scorer"] == "match"
    assert len(head.read) == len(set(head.read)) == 7, "(0, c) and (1, a) are on no list"


def test_a_fold_has_shortlists_of_its_own_and_no_pair_is_read_twice(pictures):
    captions = ["a", "b", "c"]
    head = Head([[0.5, 0.6, 0.0], [0.1, 0.7, 0.2], [0.9, 0.3, 0.2]], np.zeros((3, 3)), captions)
    samples = [
        Sample([user("", 1), assistant(c)], [pictures[i]], id=c, cluster=c)
        for i, c in enumerate(captions)
    ]
    toy = RetrievalBenchmark(samples, [MatchRetrieve(1, k_test=1)], fold_size=1)
    metrics = evaluate(head, {"b": toy}, None, progress=False)["metrics"]
    # of all: 0b, 1b, 2a and, for captions, 2a, 1b, 1c; in folds of one image also 0a and 2c
    assert len(head.read) == len(set(head.read)) == 6
    assert metrics["b/i2t_r1"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert metrics["b/i2t_r1_1"]["value"] == metrics["b/t2i_r1_1"]["ceiling"] == 1.0
