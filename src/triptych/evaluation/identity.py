"""What a number depends on, as two hashes.

The inference hash covers all that decides what a model answers: weights, architecture, tokenizer,
template, image transform, prompts, images, decoding, code and library versions. The scoring hash
covers all that decides what an answer is worth: gold answers, rules, parser and their code. Stored
answers are used again under the first, and numbers are comparable under the second.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from triptych.types import Sample

PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "bitsandbytes", "timm")
LIBRARIES += ("numpy", "pillow")
# Code that decides what a model answers, and code that decides what the answer is worth.
INFERENCE = ("models", "parts", "data", "types.py", "adapt.py", "objectives/tokens.py")
INFERENCE += tuple(
    f"evaluation/{name}.py"
    for name in ("model_predictor", "planning", "predictor", "scorers", "similarity", "baselines")
    + ("matching", "retrieving", "card/scorers", "card/scenes")
)
SCORING = ("evaluation/metrics", "evaluation/parsers.py", "evaluation/baselines.py")
SIZE = 16  # hexadecimal digits of a hash


def digest(content: Any) -> str:
    """Hash of plain values, the same in every process and on every machine."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=_named)
    return hashlib.sha256(text.encode()).hexdigest()[:SIZE]


def inference_facts(
    model: Mapping[str, Any], scorer: Any, samples: Sequence[Sample]
) -> dict[str, Any]:
    """What the answers to `samples` depend on; `hash` is over all of it."""
    whole = getattr(scorer, "whole", False)  # such scorers read captions as well as prompts
    facts = {
        **model,
        "data": _data(samples, whole),
        "decoding": plain(scorer),
        "code": code_version(INFERENCE),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }
    return {"hash": digest(facts), **facts}


def scoring_facts(
    benchmark: Any, samples: Sequence[Sample], guesses: Sequence[str]
) -> dict[str, Any]:
    """What the numbers made of answers depend on; `hash` is over all of it."""
    gold = (
        [s.id, plain(s.target), s.candidates, s.tags, s.group, s.cluster, plain(s.meta)]
        for s in samples
    )
    rules = {
        k: v
        for k, v in vars(benchmark).items()
        if k not in ("samples", "train", "prior", "scorers")
    }
    called = [v for v in rules.values() if callable(v)]
    files = [*_sources(type(benchmark).__mro__), *_sources(called)]
    facts = {
        "benchmark": f"{type(benchmark).__module__}.{type(benchmark).__qualname__}",
        "rules": plain(rules),
        "gold": _many(gold),
        "prior": digest(list(guesses)),
        "code": code_version(SCORING, tuple(sorted(set(files)))),
    }
    return {"hash": digest(facts), **facts}


def model_facts(predictor: Any) -> dict[str, Any]:
    """What a predictor's answers depend on: its own `identity`, or its weights and processor."""
    if hasattr(predictor, "identity"):
        return {"model": predictor.identity()}
    kind = f"{type(predictor).__module__}.{type(predictor).__qualname__}"
    model, processor = getattr(predictor, "model", None), getattr(predictor, "processor", None)
    if model is None:
        return {"model": kind}
    from triptych.adapt import fingerprint

    own = {type(m) for m in model.modules()}
    outside = [f for f in _sources(own) if not Path(f).is_relative_to(PACKAGE)]
    return {
        "model": kind,
        "weights": fingerprint(model),
        "modules": digest(_named(repr(model))),
        "device": str(getattr(predictor, "device", "cpu")).partition(":")[0],
        "processor": _processor(processor),
        "own_code": code_version((), tuple(sorted(set(outside)))),
    }


def config_facts(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that shape a model; files and folders by their last name, as they may move."""
    return {
        key: _unplaced(plain(cfg[key])) for key in ("model", "quantization", "peft") if key in cfg
    }


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a bundle, so that one changed byte anywhere shows."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


@lru_cache
def code_version(parts: tuple[str, ...], files: tuple[str, ...] = ()) -> str:
    """Hash of the package's own source below `parts`, and of other source files."""
    hashed = hashlib.sha256()
    for part in parts:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            hashed.update(file.relative_to(PACKAGE).as_posix().encode() + file.read_bytes())
    for file in files:
        hashed.update(Path(file).read_bytes())
    return hashed.hexdigest()[:SIZE]


def plain(value: Any) -> Any:
    """A value as JSON can hold it; objects by their type and settings, data sets by content."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and len(value) and isinstance(value[0], Sample):
        return _data(value, whole=True)
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(v) for v in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if is_dataclass(value) and not isinstance(value, type):
        settings = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"_type": type(value).__qualname__, **settings}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _data(samples: Sequence[Sample], whole: bool) -> str:
    return _many(
        [
            sample.id,
            sample.messages if whole else sample.prompt,
            [image.key for image in sample.images],
            sample.candidates,
            plain(sample.meta.get("captions")),
        ]
        for sample in (samples[i] for i in range(len(samples)))
    )


def _many(rows: Iterable[Any]) -> str:
    hashed = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=_named)
        hashed.update(text.encode() + b"\n")
    return hashed.hexdigest()[:SIZE]


def _processor(processor: Any) -> dict[str, Any]:
    """Tokenizer, template, transform and limits of a processor."""
    facts: dict[str, Any] = {"type": type(processor).__qualname__}
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words: Any = sorted(tokenizer.get_vocab().items())
        if backend is not None:
            words = json.loads(backend.to_str())
            for state in ("padding", "truncation"):  # what the last call has left there
                words.pop(state, None)
        facts["tokenizer"] = digest([words, getattr(tokenizer, "special_tokens_map", None)])
        facts["template"] = digest(getattr(tokenizer, "chat_template", None))
    library = getattr(processor, "library", None)
    if library is not None:
        facts["library"] = digest(library.to_dict())
    loader = getattr(processor, "images", None)
    facts["transform"] = plain(getattr(loader, "transform", None))
    for name in ("placeholders", "max_length", "opening"):
        facts[name] = plain(getattr(processor, name, None))
    return facts


def _sources(objects: Iterable[Any]) -> list[str]:
    """Files that define classes or functions; those of builtins and shells have none."""
    found = []
    for thing in objects:
        try:
            file = inspect.getsourcefile(thing)
        except (TypeError, OSError):
            continue
        if (
            file
            and "site-packages" not in file
            and not file.startswith(os.path.dirname(os.__file__))
        ):
            found.append(file)
    return found


def _named(value: Any) -> str:
    """A value in words that are the same in every process: without the address of an object."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _unplaced(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unplaced(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unplaced(v) for v in value]
    if isinstance(value, str) and os.sep in value and Path(value).exists():
        return Path(value).name
    return value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
