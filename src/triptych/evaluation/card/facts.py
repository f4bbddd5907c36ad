"""What stands beside a model's numbers: its family, its size, and the licences of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf


class Licence(NamedTuple):
    """The licence a publisher states, and how open the weights are under it.

    open: any use. restricted: to be downloaded, with conditions on use. closed: no weights.
    """

    name: str
    openness: str


OPENNESS = ("open", "restricted", "unknown", "closed")  # from best to worst
OWN = Licence("Apache-2.0 (this project)", "open")
UNKNOWN = Licence("not stated here", "unknown")
# Beginnings of ids, as their publishers' model cards or repositories state them; the longest wins.
LICENCES = {
    "assets/tiny": OWN,
    "openai/clip-": Licence("MIT", "open"),
    "laion/CLIP-": Licence("MIT", "open"),
    "google/siglip": Licence("Apache-2.0", "open"),
    "google/flan-t5": Licence("Apache-2.0", "open"),
    "bert-base": Licence("Apache-2.0", "open"),
    "Salesforce/blip-": Licence("BSD-3-Clause", "open"),
    "Salesforce/blip2-": Licence("MIT", "open"),
    "Salesforce/blip2-opt": Licence("MIT, over OPT (non-commercial)", "restricted"),
    "Salesforce/instructblip-vicuna": Licence("over LLaMA (non-commercial)", "restricted"),
    "facebook/opt-": Licence("OPT-175B licence (non-commercial)", "restricted"),
    "lmsys/vicuna-": Licence("Llama 2 Community Licence", "restricted"),
    "llava-hf/llava-1.5": Licence("Llama 2 Community Licence", "restricted"),
    "Qwen/Qwen-": Licence("Tongyi Qianwen Licence", "restricted"),
    "HuggingFaceTB/Smol": Licence("Apache-2.0", "open"),
    "gpt-": Licence("provider's terms", "closed"),
}
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---", re.DOTALL)
_FREE = re.compile(r"apache|mit\b|bsd|cc0|cc-by-4|openrail|mpl|gpl", re.IGNORECASE)


def model_facts(cfg: DictConfig, label: str, parameters: int | None = None) -> dict[str, Any]:
    """A row's facts: label, family, parameters, weights by part, licence and openness.

    Parts without a source of weights were trained from the start by the run, so nothing but the
    run's own licence binds them.
    """
    model = OmegaConf.to_container(cfg.model, resolve=True)
    sources = dict(_sources(model, ""))
    stated = {part: licence_of(source) for part, source in sources.items()}
    names = dict.fromkeys(licence.name for licence in stated.values())
    worst = max((x.openness for x in stated.values()), key=OPENNESS.index, default="open")
    return {
        "label": label,
        "family": str(model.get("name", "")),
        "parameters": parameters,
        "weights": sources,
        "licence": "; ".join(names) or "the run's own weights",
        "openness": worst,
    }


def licence_of(source: str) -> Licence:
    """What is known of a folder or id: its card's `licence:`/`license:` line, else the table."""
    readme = Path(source) / "README.md"
    if readme.is_file():
        front = _FRONT.match(readme.read_text(encoding="utf-8", errors="replace")[:20_000])
        said = re.search(r"^licen[sc]e:\s*(\S.*)$", front[1], re.MULTILINE) if front else None
        if said:
            name = said[1].strip().strip("\"'")[:60]
            return Licence(name, "open" if _FREE.search(name) else "restricted")
    known = [beginning for beginning in LICENCES if source.startswith(beginning)]
    return LICENCES[max(known, key=len)] if known else UNKNOWN


def _sources(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """(part, folder or id) of every pretrained part below a model's configuration."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("weights", "id") and isinstance(value, str):
            yield path or "model", value
        else:
            yield from _sources(value, f"{path}.{key}" if path else str(key))
