"""A weight a data set; regions and tags of procedural scenes; negatives of other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from triptych.data.shapes import Shapes
from triptych.evaluation.baselines import permute_images
from triptych.models.fusion import IMAGE, Prefix
from triptych.models.vlm import VLM
from triptych.objectives import image_text
from triptych.objectives.image_text import ImageText, draw_negatives
from triptych.objectives.tokens import MaskedTags, NextToken
from triptych.parts.connector import RegionConnector, StateHead
from triptych.parts.masked import MaskedLanguageModel
from triptych.parts.regions import BoxFeatures
from triptych.parts.vision import VisionEncoder
from triptych.types import Images, Tokens, TriptychError


def test_each_data_set_has_a_mean_and_a_weight_of_its_own(vlm, dialogue):
    samples = [
        replace(dialogue(("what color?", "red"), name="a"), source="pairs"),
        replace(dialogue(("circle?", "no, a square"), name="b"), source="web"),
        replace(dialogue(("what?", "blue"), images=(1,), name="c"), source="web"),
    ]
    processor, plain = vlm.processor(), NextToken()
    objective = NextToken(weights={"pairs": 0.2, "web": 1.0})
    batch = processor.rows([samples[:2], samples[2:]])  # two samples share a row
    assert len(batch.text["language"].ids) == 2
    vlm.eval()
    with torch.no_grad():
        terms, counts = objective(vlm, batch), objective.counts(batch)
        alone = [plain(vlm, processor.rows([[s]]))["next_token"].sum for s in samples]
        lengths = [plain.counts(processor.rows([[s]]))["next_token"] for s in samples]
    assert counts == {"next_token/pairs": lengths[0], "next_token/web": lengths[1] + lengths[2]}
    assert [terms[n].weight for n in counts] == [0.2, 1.0]
    torch.testing.assert_close(terms["next_token/pairs"].sum, alone[0], rtol=1e-5, atol=1e-5)
    web = alone[1] + alone[2]
    torch.testing.assert_close(terms["next_token/web"].sum, web, rtol=1e-5, atol=1e-5)
    with pytest.raises(TriptychError, match="'c'.*'web'.*objective.weights"):
        NextToken(weights={"pairs": 1.0}).counts(processor.rows([samples[2:], samples[:1]]))


@pytest.fixture
def oscar(tiny, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = {"model_type": "bert", "vocab_size": 401, "num_attention_heads": 2, **sizes}
    return VLM(
        BoxFeatures(VisionEncoder(str(tiny / "vision"), layer=-1)),
        RegionConnector,
        MaskedLanguageModel(config=bert, tokenizer=str(tiny / "language")),
        Prefix(),
        StateHead,
    ).eval()


def test_scenes_bring_regions_and_tags_with_no_file(oscar):
    scenes = Shapes(size=3, kind="captions", objects=(1, 3))
    samples = [scenes[i] for i in range(3)]
    found = [scenes.scene(i) for i in range(3)]
    assert [s.tags for s in samples] == [f.tags for f in found]
    batch = oscar.processor().collate(samples)
    tokens = batch.text["language"]
    assert (tokens.ids == IMAGE).sum(1).tolist() == [len(f.objects) for f in found]
    features = oscar.vision(batch.images)
    boxes = torch.tensor([o.box for f in found for o in f.objects])
    torch.testing.assert_close(features.tokens[:, -6:-2], boxes)
    torch.testing.assert_close(features.tokens[:, -2:], boxes[:, 2:] - boxes[:, :2])
    # the first region is what the tower says of that cut-out
    tower = oscar.vision.tower
    cut = tower(Images([], pixels=batch.images.pixels[:1])).tokens.mean(0)
    torch.testing.assert_close(features.tokens[0, :-6], cut)
    terms = MaskedTags()(oscar, batch)
    sum(t.sum for t in terms.values()).backward()
    assert oscar.connector.proj.weight.grad.any()


def test_a_picture_without_boxes_is_one_region(oscar, pictures, dialogue):
    batch = oscar.processor().collate([dialogue(("what color?", "red"))])
    assert (batch.text["language"].ids == IMAGE).sum() == 1
    assert torch.equal(batch.images.extra["boxes"], torch.tensor([[0.0, 0, 1, 1, 1, 1]]))


def test_tags_go_where_their_image_goes():
    scenes = Shapes(size=4, kind="captions")
    samples = [scenes[i] for i in range(4)]
    own = {s.images[0].key: s.tags for s in samples}
    for moved in permute_images(samples, 0):
        assert moved.tags == own[moved.images[0].key]


def test_negatives_come_from_other_ranks_and_never_from_the_own_image(monkeypatch):
    """Rank 1 of 2: rows of the other rank stand in front of its own."""
    other, own = torch.tensor([7, 3, 8]), torch.tensor([3, 4, 5])
    monkeypatch.setattr(image_text, "rank", lambda: 1)
    monkeypatch.setattr(image_text, "gather", lambda t: torch.cat([t + 1, t]))
    monkeypatch.setattr(
        image_text,
        "gather_constant",
        lambda t: torch.cat([other, t]) if t.dtype == torch.long else torch.cat([t, t]),
    )
    monkeypatch.setattr(
        image_text,
        "gather_tokens",
        lambda t: Tokens(*(torch.cat([v, v]) for v in (t.ids, t.positions, t.segments))),
    )
    monkeypatch.setattr(image_text, "_keys", lambda batch: own)
    seen = []

    def spy(scores, same):
        seen.append((scores.shape, same))
        return draw_negatives(scores, same)

    monkeypatch.setattr(image_text, "draw_negatives", spy)

    class Pairs(torch.nn.Module):
        heads = torch.nn.Module()

        def match_logits(self, states, real, tokens):
            return states.mean((1, 2))[:, None].expand(-1, 2)

    model = Pairs()
    model.heads.logit_scale = torch.zeros(())
    ids = torch.arange(3)[:, None]
    batch = type("B", (), {"text": {"text": Tokens(ids, ids * 0, ids * 0 + 1)}})()
    vectors = torch.eye(3)
    torch.manual_seed(0)
    states = torch.randn(3, 2, 4)
    ImageText(negatives="ranks").matching(model, batch, (states, None), vectors[:, None], vectors)
    expected = torch.zeros(3, 6, dtype=torch.bool)
    expected[range(3), [3, 4, 5]] = True  # itself, behind the other rank's three rows
    expected[0, 1] = True  # the other rank holds the same image
    assert len(seen) == 2
    for shape, same in seen:
        assert shape == (3, 6)
        assert torch.equal(same, expected)
