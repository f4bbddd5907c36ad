"""Numbers that can be trusted: crashes, ranks, hashes, rescoring, and any batch size."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from triptych.adapt import Quantization, adapt
from triptych.evaluation.benchmark import AnswerBenchmark
from triptych.evaluation.command import identity_of
from triptych.evaluation.embedding import RetrievalBenchmark
from triptych.evaluation.identity import inference_facts, model_facts
from triptych.evaluation.model_predictor import ModelPredictor
from triptych.evaluation.parsers import mentioned_answer
from triptych.evaluation.runner import evaluate, rescore
from triptych.evaluation.scorers import Generate, Likelihood
from triptych.evaluation.similarity import Similarity
from triptych.table import merge
from triptych.types import ImageRef, Sample, TriptychError, assistant, user

FILES = ("results.json", "samples.parquet", "gallery.html", "predictions/toy.jsonl")
WAYS = {"generate": [Generate(4)], "loglikelihood": [Likelihood()]}


def picture(number: int) -> ImageRef:
    noise = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=noise)
    return ImageRef.from_picture(Image.fromarray(pixels.numpy()), f"{number}.png")


@pytest.fixture(scope="module")
def questions() -> list[Sample]:
    """Ten pictures with one to four questions of uneven length."""
    made = []
    for i in range(10):
        ref = picture(i)
        for k in range(1 + i % 4):
            asked = user(f"is there a {'small ' * k}circle {k}?", images=1)
            answer = ["yes", "no", "two circles"][(i + k) % 3]
            name = f"{i}-{k}"
            names = ["yes", "no", "two circles"]
            made.append(
                Sample([asked, assistant(answer)], [ref], answer, names, [], name, "", f"{i}")
            )
    return made


@pytest.fixture
def model(vlm):
    """The tiny model with a connector so strong that untrained answers depend on the image."""
    with torch.no_grad():
        vlm.connector.layers[-1].weight.mul_(20)
    return vlm.eval()


def bench(questions: list[Sample], way: str = "loglikelihood", **more: Any) -> dict[str, Any]:
    return {"toy": AnswerBenchmark(questions, questions[:9], scorers=WAYS[way], **more)}


def ask(model, benchmarks: dict, out: Path, batch_size: int = 4, **more: Any) -> dict:
    predictor = ModelPredictor(model, model.processor(), batch_size)
    return evaluate(predictor, benchmarks, out, progress=False, **more)


def same(one: Path, two: Path, files: Sequence[str] = FILES) -> None:
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process of its own; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_after(predictor: Any, calls: int, method: str) -> Any:
    """A predictor whose process is killed inside the call after `calls` of them."""
    real, left = getattr(predictor, method), [calls]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(predictor, method, call)
    return predictor


# --- crashes and ranks --------------------------------------------------------------------------


@pytest.mark.parametrize("way", list(WAYS))
def test_killed_and_resumed_ends_in_the_same_bytes(model, questions, tmp_path, way):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ask(model, bench(questions, way), whole)
    timing = json.loads((whole / "timing.json").read_text())["benchmarks"]["toy"]
    assert timing["vision_calls"] == timing["distinct_images"] == 10 and timing["resumed"] == 0

    def work() -> None:
        predictor = ModelPredictor(model, model.processor(), 4)
        evaluate(dies_after(predictor, 3, way), bench(questions, way), killed, progress=False)

    assert in_child(work) == -signal.SIGKILL
    part = killed / "predictions" / "toy.rank0.jsonl"
    there = part.read_text().splitlines()
    assert 0 < len(there) < len(questions) and not (killed / "results.json").exists()
    ids = {json.loads(line)["id"] for line in there}
    missing = next(q.id for q in questions if q.id not in ids and q.id.endswith("-1"))
    with open(part, "a") as file:  # and the next batch was being written
        file.write(json.dumps({**json.loads(there[0]), "id": missing}) + "\n")
        file.write('{"id": "9-')
    ask(model, bench(questions, way), killed)
    same(whole, killed)
    timing = json.loads((killed / "timing.json").read_text())["benchmarks"]["toy"]
    assert timing["resumed"] == 1 and timing["questions"] == len(questions)
    assert timing["vision_calls"] == 10, "whole batches were kept, none was asked twice"
    assert not list((killed / "predictions").glob("*.rank*"))


@pytest.mark.parametrize("way", list(WAYS))
def test_two_ranks_end_in_the_bytes_of_one(model, questions, tmp_path, way):
    one, two = tmp_path / "one", tmp_path / "two"
    expected = ask(model, bench(questions, way), one)
    in_two(tmp_path, lambda: ask(model, bench(questions, way), two) == expected)
    same(one, two)
    timing = json.loads((two / "timing.json").read_text())["benchmarks"]["toy"]
    assert timing["ranks"] == 2 and timing["questions"] == len(questions)


def in_two(folder: Path, work: Callable[[], bool]) -> None:
    """Run something in two processes of one group; both have to say that it was right."""
    import torch.distributed as dist

    def rank(number: int) -> Callable[[], None]:
        def run() -> None:
            where = f"file://{folder}/group"
            patience = timedelta(seconds=100)
            dist.init_process_group(
                "gloo", init_method=where, timeout=patience, rank=number, world_size=2
            )
            assert work()
            dist.barrier()

        return run

    second = os.fork()
    if second == 0:
        code = 1
        try:
            rank(1)()
            code = 0
        finally:
            os._exit(code)
    assert in_child(rank(0)) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 0


class Colors:
    """Embeds a picture as its first pixel and a text as its first letters; counts its calls."""

    capabilities = frozenset({"embed"})
    batch_size, generated_tokens = 3, 0

    def __init__(self) -> None:
        self.vision_calls = 0

    def embed_images(self, refs):
        self.vision_calls += len(refs)
        rows = [torch.tensor(ref.open().getpixel((0, 0)), dtype=torch.float32) for ref in refs]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)[:, None]

    def embed_texts(self, texts):
        rows = [torch.tensor([ord(c) % 13 + 1 for c in t[:3]], dtype=torch.float32) for t in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def gallery() -> dict[str, RetrievalBenchmark]:
    words = ["abc", "bdf", "cfi", "dhl", "ejo", "flr", "gnu", "hpx"]
    samples = []
    for i, word in enumerate(words):
        samples.append(Sample([user("", 1), assistant(word)], [picture(i)], id=word))
    return {"toy": RetrievalBenchmark(samples)}


def test_embeddings_are_shared_by_ranks_and_survive_a_kill(tmp_path):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    evaluate(Colors(), gallery(), one, progress=False)
    in_two(tmp_path, lambda: evaluate(Colors(), gallery(), two, progress=False) is not None)
    same(one, two)
    calls = json.loads((two / "timing.json").read_text())["benchmarks"]["toy"]["vision_calls"]
    assert calls == 8, "each block by one rank"

    def work() -> None:
        evaluate(dies_after(Colors(), 2, "embed_images"), gallery(), killed, progress=False)

    assert in_child(work) == -signal.SIGKILL
    again = Colors()
    evaluate(again, gallery(), killed, progress=False)
    assert again.vision_calls == 2, "two blocks of three had been kept"
    same(one, killed)
    assert not list((killed / "predictions").glob("*.scratch"))


# --- hashes and rescoring -----------------------------------------------------------------------


def test_rescoring_needs_no_model_and_gives_the_same_bytes(model, questions, tmp_path):
    first = ask(model, bench(questions, "generate"), tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert rescore(bench(questions, "generate"), tmp_path) == first
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == kept

    other = bench(questions, "generate", parser=mentioned_answer)
    anew = rescore(other, tmp_path)["metrics"]["toy/accuracy"]
    before = first["metrics"]["toy/accuracy"]
    assert anew["parser"] == "mentioned_answer" != before["parser"]
    assert anew["scoring_hash"] != before["scoring_hash"]
    assert anew["inference_hash"] == before["inference_hash"]
    (tmp_path / "predictions" / "toy.jsonl").write_text("")
    with pytest.raises(TriptychError, match="lacks 23 answers.*evaluate.py again"):
        rescore(other, tmp_path)
    with pytest.raises(TriptychError, match="no stored answers"):
        rescore(other, tmp_path / "nowhere")


def test_changed_gold_changes_the_scoring_hash_alone(model, questions, tmp_path):
    first = ask(model, bench(questions), tmp_path)["metrics"]["toy/accuracy"]
    turned = [replace(q, target="no") for q in questions]
    predictor = ModelPredictor(model, model.processor(), 4)
    second = evaluate(predictor, bench(turned), tmp_path, progress=False)["metrics"]["toy/accuracy"]
    assert second["inference_hash"] == first["inference_hash"] and predictor.vision_calls == 0
    assert second["scoring_hash"] != first["scoring_hash"] and second["value"] != first["value"]


def test_one_changed_bit_changes_the_inference_hash(model, questions, tmp_path):
    def hashed(**identity: Any) -> str:
        facts = model_facts(ModelPredictor(model, model.processor())) | identity
        return inference_facts(facts, Likelihood(), questions)["hash"]

    first = hashed()
    assert hashed() == first
    raw = next(model.language.parameters()).data.view(-1)[:1].view(torch.int32)
    raw ^= 1
    assert hashed() != first
    raw ^= 1
    assert hashed() == first
    prompt = [replace(questions[0], messages=[user("else?", 1)]), *questions[1:]]
    other = [replace(questions[0], images=[picture(99)]), *questions[1:]]
    facts = model_facts(ModelPredictor(model, model.processor()))
    hashes = {inference_facts(facts, Likelihood(), q)["hash"] for q in (questions, prompt, other)}
    hashes |= {inference_facts(facts, Generate(n), questions)["hash"] for n in (4, 5)}
    assert len(hashes) == 5 and first in hashes


def test_every_byte_of_a_bundle_is_in_the_identity(tmp_path):
    from triptych.build import Adapted
    from triptych.evaluation.identity import digest, file_hashes

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "tokenizer" / "x.json").write_text("{}")
    seen = {digest(file_hashes(tmp_path))}
    for at in (0, 77, 199):
        content = bytearray(range(200))
        content[at] ^= 1
        (tmp_path / "weights.safetensors").write_bytes(content)
        seen.add(digest(file_hashes(tmp_path)))
    assert len(seen) == 4
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"model": {"vision": {"weights": str(tmp_path)}, "layer": -2}})
    facts = identity_of(cfg, Adapted(None, None, {"vision": "abc"}), tmp_path)
    assert facts["config"]["model"]["vision"]["weights"] == tmp_path.name, "folders may move"
    assert set(facts["bundle"]) == {"weights.safetensors", "tokenizer/x.json"}


def test_other_weights_are_asked_anew(model, questions, tmp_path, capsys):
    first = ask(model, bench(questions), tmp_path)
    with torch.no_grad():
        model.connector.layers[0].weight.add_(0.5)
    predictor = ModelPredictor(model, model.processor(), 4)
    second = evaluate(predictor, bench(questions), tmp_path)
    assert predictor.vision_calls >= 10
    assert "asked anew, since other: weights" in capsys.readouterr().out
    keys = "toy/accuracy", "inference_hash"
    assert second["metrics"][keys[0]][keys[1]] != first["metrics"][keys[0]][keys[1]]
    assert (tmp_path / "predictions" / "toy.before.jsonl").read_text().count("\n") == len(questions)


# --- scorers ------------------------------------------------------------------------------------


def test_every_scorer_has_keys_of_its_own(model, questions, tmp_path):
    both = {"toy": AnswerBenchmark(questions, scorers=[Generate(4), Likelihood()])}
    metrics = ask(model, both, tmp_path, scorer="all")["metrics"]
    assert set(metrics) == {"toy/accuracy", "toy/accuracy@loglikelihood"}
    assert metrics["toy/accuracy"]["scorer"] == "generate"
    assert rescore(both, tmp_path, scorer="all")["metrics"] == metrics
    alone = ask(model, both, tmp_path / "alone", scorer="loglikelihood")["metrics"]
    assert alone == {"toy/accuracy@loglikelihood": metrics["toy/accuracy@loglikelihood"]}
    with pytest.raises(TriptychError, match="eval.scorer=match is none that benchmark 'toy'"):
        ask(model, both, tmp_path, scorer="match")


def test_what_a_model_cannot_do_is_left_out_and_said(model, questions, tmp_path):
    both = {**bench(questions), "pairs": gallery()["toy"]}
    results = ask(model, both, tmp_path)
    assert "pairs" in results["left_out"] and "embed" in results["left_out"]["pairs"]
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_permuted_images_are_another_question(model, questions, tmp_path):
    own = ask(model, bench(questions), tmp_path / "own")["metrics"]["toy/accuracy"]
    other = ask(model, bench(questions), tmp_path / "other", images="permuted")["metrics"]
    assert other["toy/accuracy"]["inference_hash"] != own["inference_hash"]
    assert other["toy/accuracy"]["blind"] is None
    with pytest.raises(TriptychError, match="eval.images='none'"):
        ask(model, bench(questions), tmp_path, images="none")


@pytest.mark.parametrize("bits", ["none", "nf4", "int8"])
def test_batch_1_equals_batch_16_on_every_scorer(model, questions, bits):
    assert max(differences(model, questions, bits)) <= 1e-4


def differences(model, questions: list[Sample], bits: str) -> list[float]:
    """Largest difference of log-likelihoods between batch 1 and 16; answers have to be equal."""
    how = Quantization(bits, compute_dtype="float32")
    table = merge(model, {"vision": "frozen", "connector": "full", "language": "frozen"}, {}, {})
    adapt(model, table, None, how)
    if bits != "none":
        assert any(
            "Linear4bit" in type(m).__name__ or "8bit" in type(m).__name__
            for m in model.language.modules()
        )
    small, large = (ModelPredictor(model, model.processor(), size) for size in (1, 16))
    names = [q.candidates for q in questions]
    one, many = (p.loglikelihood(questions, names) for p in (small, large))
    pairs = [(a, b) for r, s in zip(one, many, strict=True) for a, b in zip(r, s, strict=True)]
    words = [p.generate(questions, max_new_tokens=4) for p in (small, large)]
    assert words[0] == words[1] and len(set(words[0])) > 1
    best = [[max(range(3), key=lambda i: row[i].sum) for row in rows] for rows in (one, many)]
    assert best[0] == best[1]
    return [abs(a.sum - b.sum) for a, b in pairs]


@pytest.mark.parametrize("peft", ["family", "qlora"])
def test_batch_1_equals_batch_16_for_embeddings(questions, peft):
    from triptych.build import build_model
    from triptych.bundle import compose_preset

    model = build_model(compose_preset("clip", [f"peft={peft}"])).model.eval()
    refs = [picture(i) for i in range(20)]
    texts = [f"a {'small ' * (i % 5)}circle {i}" for i in range(20)]
    small, large = (ModelPredictor(model, model.processor(), size) for size in (1, 16))
    for name, items in (("embed_images", refs), ("embed_texts", texts), ("features", refs)):
        one, many = (getattr(p, name)(items) for p in (small, large))
        torch.testing.assert_close(one, many, rtol=0, atol=1e-4)
        assert one.std(0).max() > 1e-3
    answers = [[o.parsed for o in Similarity().ask(p, questions)] for p in (small, large)]
    assert answers[0] == answers[1] and None not in answers[0]
