"""Q-Former families against the library's own classes: BLIP-2 stage 2, InstructBLIP, MiniGPT-4."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from triptych.api import load
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.interop import blip2
from triptych.models.fusion import IMAGE, Prefix
from triptych.models.vlm import VLM
from triptych.objectives.tokens import NextToken
from triptych.parts.language import LanguageModel
from triptych.parts.qformer import InstructQFormer, PairQFormer, QFormer
from triptych.parts.seq2seq import Seq2SeqModel
from triptych.parts.vision import VisionEncoder
from triptych.types import (
    IGNORE,
    Batch,
    ImageFeatures,
    Images,
    Sample,
    Tokens,
    TriptychError,
    assistant,
    user,
)

Q, TEXT, VOCAB = 3, 5, 40
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QFORMER = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 24,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 20,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 20,
    "max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 20,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCAB,
    "d_model": 20,
    "d_kv": 10,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}


def reference(family: str, text: dict, attention: str):
    import transformers

    names = {"blip2": "Blip2", "instructblip": "InstructBlip"}
    kind = names[family]
    config = getattr(transformers, kind + "Config")(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text,
        num_query_tokens=Q,
        image_token_index=VOCAB - 1,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForConditionalGeneration")._from_config(
        config, attn_implementation=attention
    )
    with torch.no_grad():  # away from zeros and ones, so that every tensor matters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def batch_of(decoder: bool = False) -> tuple[Batch, torch.Tensor]:
    """Two images, two rows [image x Q, words], and the library's ids of the same."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    words = torch.randint(3, VOCAB - 1, (2, TEXT))
    ids = torch.cat([torch.full((2, Q), IMAGE), words], 1)
    places = torch.arange(Q + TEXT).expand(2, -1)
    language = Tokens(ids, places, torch.ones_like(ids), ids)
    read = torch.randint(1, 30, (2, 4))
    text = Tokens(read, torch.arange(4).expand(2, -1), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    roles = {"language": language, "text": text}
    if decoder:
        answer = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
        labels = answer.clone()
        labels[:, 0] = IGNORE
        roles["decoder"] = Tokens(answer, torch.arange(4).expand(2, -1), answer * 0 + 1, labels)
    slots = torch.tensor([[0, 0, 1], [1, 1, 1]])
    theirs = ids.masked_fill(ids == IMAGE, VOCAB - 1)
    return Batch(Images(["a", "b"], pixels), slots, roles, []), theirs


CASES = [("blip2", OPT), ("blip2", T5), ("instructblip", LLAMA), ("instructblip", T5)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "text"), CASES)
def test_logits_and_answers_are_the_librarys(family, text, attention, tokenizer):
    theirs = reference(family, text, attention)
    ours = blip2.from_hf(theirs.config, theirs.state_dict(), implementation=attention).eval()
    ours.language.__dict__["tokenizer"] = tokenizer
    ours.language.__dict__["stop_ids"] = [2]
    batch, ids = batch_of(decoder=text is T5)
    kwargs = {"pixel_values": ours.vision.transform.normalize(batch.images.pixels)}
    if family == "instructblip":
        tokens = batch.text["text"]
        kwargs |= {"qformer_input_ids": tokens.ids, "qformer_attention_mask": tokens.mask.long()}
    with torch.no_grad():
        steps = {"decoder_input_ids": batch.text["decoder"].ids} if text is T5 else {}
        expected = theirs(input_ids=ids, **steps, **kwargs).logits
        logits = ours.language.logits(ours(batch))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2}
        said = theirs.generate(input_ids=ids, **settings, pad_token_id=0, **kwargs)
        said = said[:, 1:] if text is T5 else said[:, ids.shape[1] :] if said.shape[1] > 6 else said
        torch.testing.assert_close(ours.generate(batch, max_new_tokens=6), said)


@pytest.mark.parametrize(("family", "text"), CASES)
def test_export_gives_back_every_tensor(family, text):
    theirs = reference(family, text, "eager").state_dict()
    config = reference(family, text, "eager").config
    back = blip2.to_hf(blip2.from_hf(config, theirs), config)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_foreign_tensor_is_refused():
    theirs = reference("blip2", OPT, "eager")
    state = theirs.state_dict() | {"visual.odd": torch.zeros(1)}
    with pytest.raises(TriptychError, match="visual.odd"):
        blip2.from_hf(theirs.config, state)


def q_config() -> dict:
    return {k: v for k, v in QFORMER.items() if k != "encoder_hidden_size"}


@pytest.fixture
def features() -> ImageFeatures:
    return ImageFeatures(torch.randn(2 * 5, 24), torch.tensor([5, 5]))


def test_images_of_different_sizes_give_what_each_gives_alone():
    qformer = QFormer(24, 20, Q, q_config()).eval()
    tokens = torch.randn(8, 24)
    both = qformer(ImageFeatures(tokens, torch.tensor([5, 3]))).tokens
    alone = [qformer(ImageFeatures(t, torch.tensor([len(t)]))).tokens for t in tokens.split([5, 3])]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_the_instruction_changes_the_queries(features):
    torch.manual_seed(0)
    qformer = InstructQFormer(24, 20, Q, q_config()).eval()
    one = Tokens(torch.tensor([[4, 5], [4, 5]]), torch.arange(2).expand(2, -1), torch.ones(2, 2))
    other = Tokens(torch.tensor([[4, 5], [4, 6]]), one.positions, one.segments)
    first, second = (qformer(features, t).tokens.view(2, Q, -1) for t in (one, other))
    assert torch.equal(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 1e-4
    with pytest.raises(TriptychError, match="instruction"):
        qformer(features)


def test_queries_never_see_the_text_they_help_to_write(features):
    """Stage 1's third mask: another text, same query states; a later word, same earlier states."""
    torch.manual_seed(0)
    qformer = PairQFormer(24, None, Q, q_config()).eval()
    states = features.tokens.view(2, 5, 24)
    tokens = Tokens(torch.randint(1, 30, (2, 6)), torch.arange(6).expand(2, -1), torch.ones(2, 6))
    changed = Tokens(tokens.ids.clone(), tokens.positions, tokens.segments)
    changed.ids[:, 3] = (changed.ids[:, 3] + 1) % 29 + 1
    from triptych.parts.qformer import causal

    first, second = (qformer._both(states, None, t, causal(t, Q)) for t in (tokens, changed))
    torch.testing.assert_close(first[:, : Q + 3], second[:, : Q + 3], rtol=0, atol=0)
    torch.testing.assert_close(first[:, :Q], qformer.look(states, None), rtol=1e-5, atol=1e-5)
    assert (first[:, Q + 3 :] - second[:, Q + 3 :]).abs().amax(-1).min() > 1e-4
    # matching lets both sides see each other
    grounded = [qformer.ground(states, None, t) for t in (tokens, changed)]
    assert (grounded[0] - grounded[1]).abs().max() > 1e-4


def test_minigpt4_trains_one_weight_and_one_bias(tiny, dialogue, tokenizer):
    from triptych.adapt import Quantization, adapt
    from triptych.table import merge

    vision = VisionEncoder(str(tiny / "vision"), layer=-2, select="cls_patch")
    language = LanguageModel(str(tiny / "language"))
    model = VLM(vision, partial(QFormer, queries=Q, config=q_config()), language, Prefix())
    states = {
        "vision": "frozen",
        "connector": "frozen",
        "connector.proj": "full",
        "language": "frozen",
    }
    adapt(model, merge(model, states, {}, {}), None, Quantization())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["connector.proj.weight", "connector.proj.bias"]
    batch = model.processor().collate([dialogue(("what color?", "red"))])
    assert (batch.text["language"].ids == IMAGE).sum() == Q
    NextToken()(model, batch)["next_token"].sum.backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n in trained
    )
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)


def test_an_instruct_model_reads_each_samples_own_words(tiny, dialogue):
    torch.manual_seed(0)
    vision = VisionEncoder(str(tiny / "vision"), layer=-2, select="cls_patch")
    language = LanguageModel(str(tiny / "language"))
    config = q_config() | {"vocab_size": 400}
    connector = partial(
        InstructQFormer,
        queries=Q,
        config=config,
        reader={"tokenizer": str(tiny / "language"), "max_length": 16},
    )
    model = VLM(vision, connector, language, Prefix()).eval()
    samples = [dialogue(("what color?", "red"), name="a"), dialogue(("a circle?", "no"), name="b")]
    processor = model.processor()
    batch = processor.rows([samples])
    assert len(batch.text["language"].ids) == len(batch.text["text"].ids) == 2
    assert len(batch.images) == 1  # one picture, encoded once, read twice
    words = processor.tokenizer.batch_decode(batch.text["text"].ids, skip_special_tokens=True)
    assert words == ["what color?", "a circle?"]
    visual = model.visual(batch)
    assert visual.counts.tolist() == [Q, Q]
    assert (visual.tokens[:Q] - visual.tokens[Q:]).abs().max() > 1e-4
    prompts = processor.prompts(samples)
    assert torch.equal(prompts.text["text"].ids, batch.text["text"].ids)


def test_a_seq2seq_model_trains_on_the_answer_alone(tiny, tokenizer, dialogue, tmp_path):
    vision = VisionEncoder(str(tiny / "vision"), layer=-2, select="cls_patch")
    config = T5 | {"vocab_size": 400}
    language = Seq2SeqModel(config=config, tokenizer=str(tiny / "language"))
    model = VLM(vision, partial(QFormer, queries=Q, config=q_config()), language, Prefix()).eval()
    sample = dialogue(("what color?", "red"))
    batch = model.processor().collate([sample])
    labels = batch.text["decoder"].labels
    assert tokenizer.decode(labels[labels != IGNORE]) == "red<|end|>"
    assert "red" not in tokenizer.decode(batch.text["language"].ids.clamp_min(0)[0])
    objective = NextToken()
    ours = objective(model, batch)["next_token"].sum / objective.counts(batch)["next_token"]
    embeds, _ = model.fusion(language.embed(batch.text["language"]), model.visual(batch), batch)
    theirs = language.model(
        inputs_embeds=embeds,
        decoder_input_ids=batch.text["decoder"].ids[:, :-1],
        labels=labels[:, 1:],
    ).loss
    torch.testing.assert_close(ours, theirs)
    other = dialogue(("describe the picture: is there a circle?", "no"), name="long")
    both = model.processor().collate([sample, other])  # of different lengths, padded
    together = objective(model, both)["next_token"].sum
    alone = sum(
        objective(model, model.processor().collate([s]))["next_token"].sum for s in (sample, other)
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_stage_two_starts_from_stage_one_by_name(tmp_path, features):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    first = PairQFormer(24, None, Q, q_config()).eval()
    state = {f"connector.{n}": t.clone() for n, t in first.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    second = QFormer(24, 20, Q, q_config(), weights=str(tmp_path)).eval()
    states = features.tokens.view(2, 5, 24)
    torch.testing.assert_close(second.look(states, None), first.look(states, None))
    with pytest.raises(TriptychError, match="lacks"):
        QFormer(24, 20, Q + 1, q_config(), weights=str(tmp_path))
    del state["connector.norm.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(TriptychError, match="norm.weight"):
        QFormer(24, 20, Q, q_config(), weights=str(tmp_path))


def test_a_tower_is_taken_out_of_a_whole_checkpoint(tmp_path):
    theirs = reference("blip2", OPT, "eager")
    theirs.save_pretrained(tmp_path)
    tower = VisionEncoder(
        str(tmp_path), model_class="transformers.Blip2VisionModel", prefix="vision_model"
    )
    expected = theirs.vision_model.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in tower.model.state_dict().items())
    with pytest.raises(TriptychError, match="lack"):
        VisionEncoder(str(tmp_path), model_class="transformers.Blip2VisionModel")


@pytest.mark.parametrize("name", ["instructblip", "blip2"])
def test_candidates_are_scored_as_each_alone_whoever_reads_the_question(name, pictures):
    torch.manual_seed(0)
    model = load(name).model.eval()
    processor, objective = model.processor(), NextToken()
    asked = [
        Sample([user(question, 1), assistant("x")], [picture], id=question)
        for question, picture in zip(("what color?", "is it a circle?"), pictures, strict=False)
    ]
    names = [["red", "a blue one"], ["yes", "no", "perhaps"]]
    scored = ModelPredictor(model, processor, 8).loglikelihood(asked, names)
    for sample, candidates, scores in zip(asked, names, scored, strict=True):
        for candidate, score in zip(candidates, scores, strict=True):
            alone = Sample([*sample.prompt, assistant(candidate)], sample.images, id=candidate)
            with torch.no_grad():
                term = objective(model, processor.collate([alone]))["next_token"]
            assert score.sum == pytest.approx(-float(term.sum), abs=1e-4)
    assert len({round(score.sum, 3) for scores in scored for score in scores}) == 5
