"""Answering easy-VQA questions: this project's predictor against a generate call per question.

python benchmarks/evaluate.py [--questions 1000] [--quick]

Both answer with the same weights (random, as the model of model_a.py), greedily, at most eight
tokens; the answers have to be identical.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import model_a
import side_by_side
from side_by_side import Memory, Result, finished

NEW = 8
VARIANTS = (
    "per_question",
    "ours",
    "ours_without_shared_prefill",
    "ours_without_roomy_cache",
    "ours_batch_1",
)
WARM = 64  # questions answered before the clock starts


def samples(count: int) -> list:
    from triptych.data.readers import EasyVQA

    reader = EasyVQA("test")
    order = sorted(range(len(reader)), key=lambda i: reader.clusters[i])  # images stand together
    return [reader[i] for i in order[:count]]


def library():
    """The class with the weights of the benchmark, its adapters left out."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(model_a.folder()).eval()
    return model, AutoProcessor.from_pretrained(model_a.folder())


def per_question(chosen: list):
    model, processor = library()
    _ask_each(model, processor, chosen[:WARM])
    yield None
    yield _ask_each(model, processor, chosen)


def _ask_each(model, processor, chosen: list) -> list[str]:
    import torch

    answers = []
    for sample in chosen:
        asked = sample.messages[0]["content"][-1]["text"]
        prompt = f"<bos><|user|><image>\n{asked}<|end|><|assistant|>"
        inputs = processor(
            images=[sample.images[0].open()],
            text=[prompt],
            add_special_tokens=False,
            return_tensors="pt",
        )
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        new = out[:, inputs["input_ids"].shape[1] :]
        answers.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers


def ours(chosen: list, variant: str):
    from triptych.evaluation.model_predictor import ModelPredictor
    from triptych.hardware import keep_memory
    from triptych.interop import from_hf

    keep_memory()
    model = from_hf(str(model_a.folder()), template=model_a.TEMPLATE).eval()
    if variant == "ours_without_shared_prefill":
        import triptych.models.vlm as vlm

        vlm.first_alike = lambda batch: None
    if variant == "ours_without_roomy_cache":
        from triptych.parts import roomy_cache

        roomy_cache.with_room = lambda cache: cache
    size = 1 if variant == "ours_batch_1" else 64
    predictor = ModelPredictor(model, model.processor(), batch_size=size)
    predictor.generate(chosen[:WARM], max_new_tokens=NEW)
    yield None
    yield predictor.generate(chosen, max_new_tokens=NEW)


def run(variant: str, chosen: list) -> tuple[list[str], float, float]:
    steps = per_question(chosen) if variant == "per_question" else ours(chosen, variant)
    next(steps)
    with Memory() as memory:
        start = time.perf_counter()
        answers = next(steps)
        seconds = time.perf_counter() - start
    return answers, seconds, memory.added_mib


def check(args) -> Result:
    """The same answers to the first questions."""
    chosen = samples(20 if args.quick else 200)
    theirs, own = run("per_question", chosen)[0], run("ours", chosen)[0]
    different = sum(a != b for a, b in zip(theirs, own, strict=True))
    if different:
        raise SystemExit(f"{different} of {len(chosen)} answers differ: {theirs[:3]} {own[:3]}")
    return {"questions": len(chosen), "different": different, "distinct answers": len(set(own))}


def measure(variant: str, args) -> Result:
    chosen = samples(args.questions)
    answers, seconds, added = run(variant, chosen)
    digest = hashlib.sha256("\n".join(answers).encode()).hexdigest()[:16]
    return finished(len(chosen), seconds, added_mib=added, unit="questions/s", answers=digest)


def main() -> None:
    parse = side_by_side.parser(__doc__)
    parse.add_argument("--questions", type=int, default=None)
    args = parse.parse_args()
    args.questions = args.questions or (40 if args.quick else 1000)
    side_by_side.main("evaluate", args, VARIANTS, check, measure, "per_question")


if __name__ == "__main__":
    main()
