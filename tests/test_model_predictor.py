"""Answers and likelihoods of a real, tiny, untrained VLM: the same at any batch size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from triptych.data.processor import ChatProcessor, ImageLoader
from triptych.data.transforms import ImageTransform
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.models.fusion import Prefix
from triptych.models.vlm import VLM
from triptych.parts.connector import MLPConnector
from triptych.types import IGNORE, SHARED, DataError, ImageRef, Sample, assistant, user

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LANGUAGE = {
    "model_type": "llama",
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.4,  # so that untrained answers differ
    "pad_token_id": 256,
    "eos_token_id": 257,
    "bos_token_id": None,
}


def tokenizer_folder(folder: Path) -> str:
    """A tokenizer of the 256 bytes, saved as the library saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, ChatProcessor]:
    from triptych.parts.language import LanguageModel
    from triptych.parts.vision import VisionEncoder

    torch.manual_seed(0)
    folder = tokenizer_folder(tmp_path_factory.mktemp("bytes"))
    transform = ImageTransform(size=(16, 16))
    vision = VisionEncoder(config=VISION, transform=transform)
    language = LanguageModel(config=LANGUAGE, tokenizer=folder)
    model = VLM(vision, partial(MLPConnector, depth=1), language, Prefix()).eval()
    with torch.no_grad():
        model.connector.layers[0].weight.mul_(20)  # so that untrained answers see the image
    images = ImageLoader(transform)
    return model, ChatProcessor(language.tokenizer, images, model.placeholders(16, 16), 400)


def predictor(parts: tuple[VLM, ChatProcessor], batch_size: int) -> ModelPredictor:
    return ModelPredictor(*parts, batch_size=batch_size)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Three pictures with 1, 2 and 5 questions of uneven length, mixed, and one without any."""
    colors = ("red", "green", "blue")
    refs = [ImageRef.from_picture(Image.new("RGB", (16, 16), color), color) for color in colors]
    made = [Sample([user("no picture here?"), assistant("x")], id="text")]
    for i, ref in enumerate([refs[k] for k in (2, 0, 2, 1, 2, 1, 2, 2)]):
        turns = [user("q" * (i % 3 + 1) + f"{i}?", images=1), assistant("x")]
        if i == 3:
            turns = [user("hello", images=1), assistant("well"), user("and?"), assistant("x")]
        made.append(Sample(turns, [ref], id=f"s{i}", cluster=ref.name))
    return made


CANDIDATES = [["a", "bcd"], ["yes", "no", "both of them"], ["고양이", "개"]]


def test_answers_do_not_depend_on_the_batch_size(parts, samples) -> None:
    alone, few, many = (predictor(parts, size) for size in (1, 3, 64))
    answers = alone.generate(samples, max_new_tokens=6)
    assert few.generate(samples, max_new_tokens=6) == answers
    assert many.generate(samples, max_new_tokens=6) == answers
    assert len(set(answers)) > 4, "an untrained model of this width answers unlike questions apart"
    assert alone.vision_calls == few.vision_calls == many.vision_calls == 3
    assert alone.generated_tokens == many.generated_tokens > 0
    assert alone.capabilities == {"generate", "loglikelihood", "sentences"}


def test_an_answer_sees_its_own_image(parts, samples) -> None:
    asked = samples[1]
    model = predictor(parts, 8)
    other = Sample(asked.messages, samples[2].images, id="other")
    one, two = model.loglikelihood([asked, other], [["a"], ["a"]])
    assert abs(one[0].sum - two[0].sum) > 1e-3


def test_likelihoods_are_those_of_each_answer_alone(parts, samples) -> None:
    model, processor = parts
    candidates = [CANDIDATES[i % 3] for i in range(len(samples))]
    scored = predictor(parts, 64).loglikelihood(samples, candidates)
    small = predictor(parts, 1).loglikelihood(samples, candidates)
    for sample, names, row, again in zip(samples, candidates, scored, small, strict=True):
        for name, score, same in zip(names, row, again, strict=True):
            answered = Sample([*sample.prompt, assistant(name)], sample.images)
            batch = processor.collate([answered])
            ids = batch.text["language"].ids[0]
            with torch.no_grad():
                chances = model.language.logits(model(batch))[0].log_softmax(-1)
            # by hand: the answer's bytes and the stop token, before the template's last newline
            length = len(name.encode()) + 1
            places = range(len(ids) - 1 - length, len(ids) - 1)
            assert ids[places[-1]] == processor.tokenizer.eos_token_id
            expected = sum(float(chances[t - 1, ids[t]]) for t in places)
            assert score.sum == pytest.approx(expected, abs=1e-4)
            assert same.sum == pytest.approx(score.sum, abs=1e-4)
            assert (score.tokens, score.bytes) == (length, length - 1)


def test_candidates_share_their_prompt(parts, samples) -> None:
    _, processor = parts
    sample = samples[4]  # a dialogue whose first answer is no candidate
    row = [Sample([*sample.prompt, assistant(name)], sample.images) for name in ("ab", "ac")]
    shared = processor.candidates([row]).text["language"]
    whole = processor.collate(row[:1]).text["language"].ids[0]
    own = len(b"ab") + len(["<end>", "newline"])
    assert int((shared.segments == SHARED).sum()) == len(whole) - own
    assert shared.ids.shape == (1, len(whole) + own)
    places = (shared.labels != IGNORE).nonzero()[:, 1].tolist()
    assert places == [len(whole) - own + i for i in (0, 1, 2, 4, 5, 6)]


def test_many_candidates_spill_into_more_rows(parts, samples) -> None:
    names = [
        f"candidate number {i}" for i in range(40)
    ]  # 40 x 20 tokens behind a prompt, in rows of 400
    model = predictor(parts, 2)
    together = model.loglikelihood(samples[1:3], [names, names[:2]])
    assert [len(row) for row in together] == [40, 2]
    for i in (0, 15, 25, 39):
        alone = model.loglikelihood(samples[1:2], [[names[i]]])[0][0]
        assert together[0][i].sum == pytest.approx(alone.sum, abs=1e-4)


def test_what_is_too_long_is_refused_by_name(parts, samples) -> None:
    with pytest.raises(DataError, match="candidates of samples 's0' to 's0'"):
        predictor(parts, 1).loglikelihood([samples[1]], [["y", "x" * 400]])
    with pytest.raises(DataError, match="'long' reaches data.max_length=400"):
        long = Sample([user("q" * 500, images=1)], samples[1].images, id="long")
        predictor(parts, 2).generate([samples[1], long])


def test_modules_keep_their_modes_and_images_their_count(parts, samples) -> None:
    model, processor = parts
    model.language.train()
    model.vision.eval()
    before = {name: module.training for name, module in model.named_modules()}
    cached = predictor(parts, 4)
    cached.generate(samples, max_new_tokens=2)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.eval()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert cached.vision_calls == 3


def test_changed_weights_change_the_answers(parts, samples) -> None:
    model, _ = parts
    same = predictor(parts, 4)
    first = same.loglikelihood(samples[1:2], [["a"]])[0][0].sum
    with torch.no_grad():
        for parameter in model.vision.parameters():
            parameter.add_(0.3)
    try:
        assert same.loglikelihood(samples[1:2], [["a"]])[0][0].sum != first
    finally:
        with torch.no_grad():
            for parameter in model.vision.parameters():
                parameter.sub_(0.3)
