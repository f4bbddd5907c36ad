"""Look at a data set as a model will: `python -m triptych.data.check model=llava data=instructions
data.path=mine.jsonl data.images=pictures/`.

Reads every sample and decodes every picture; prints what would stop a run and what would train in
silence, and writes check.html (findings, lengths, and samples with the tokens that carry loss in
colour) and check.json. No weights are loaded. Beside the options of train.py: out=DIR (data_check),
most=N (the first N samples), show=24 (samples on the page). Exit code 1 if a run would stop.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.options import beside_training, run_tool, whole_number
from triptych.types import TriptychError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from triptych.data.inspection import Inspection

OWN = ("out", "most", "show")
NAMED = 3  # findings of a kind that are printed; the files hold all


def main(argv: Sequence[str] | None = None) -> int:
    """0 if a run would start, 1 if not, 2 with one sentence if the options are wrong."""
    return run_tool(_run, __doc__, argv)


def _run(words: Sequence[str]) -> int:
    from triptych.build import build_model
    from triptych.bundle import compose_preset
    from triptych.data.check_page import write_page
    from triptych.data.inspection import inspect
    from triptych.hardware import quiet_libraries

    own, model, overrides = beside_training(words, OWN)
    most = whole_number(own, "most", 0) if "most" in own else None
    show = whole_number(own, "show", 24, least=0)
    quiet_libraries()
    cfg = compose_preset(model, overrides)
    reader = _reader(cfg)
    processor = build_model(cfg, meta=True).model.processor()
    processor.max_length = cfg.data.max_length
    transform = getattr(getattr(processor, "images", None), "transform", None)
    side = min(transform.size) if transform else None
    found = inspect(reader, processor, side, most, show)
    out = Path(own.get("out", "data_check"))
    out.mkdir(parents=True, exist_ok=True)
    title = f"data={cfg.data.name}, as model={cfg.model.name} reads it"
    (out / "check.json").write_text(json.dumps(facts(found), indent=1))
    write_page(out / "check.html", title, found, getattr(processor, "tokenizer", None))
    text = f"{title}\n{summary(found)}\n{out / 'check.html'}"
    print(text.encode("utf-8", "replace").decode())  # data may hold halves of characters
    return int(found.stops)


def _reader(cfg: DictConfig) -> Any:
    """The training samples; a reader that would stop at its first wrong row is told not to."""
    from omegaconf import OmegaConf

    from triptych.build import build
    from triptych.targets import locate

    node = OmegaConf.to_container(cfg.data, resolve=True).get("train")
    if node is None:
        raise TriptychError(
            f"data={cfg.data.name} is a stream, whose samples cannot be looked up; check the files "
            "it was made from, as data=instructions or data=captions."
        )
    if "check" in signature(locate(node["_target_"], "data.train")).parameters:
        node["check"] = 0
    return build(OmegaConf.create(node))


def facts(found: Inspection) -> dict[str, Any]:
    """What check.json holds."""
    return {
        "samples": found.samples,
        "images": found.images,
        "max_length": found.limit or None,
        "tokens": spread(found.lengths),
        "tokens_with_loss": spread(found.learned),
        "stops": found.stops,
        "findings": {
            kind: [{"sample": f.sample, "says": f.says} for f in some]
            for kind, some in found.kinds().items()
        },
    }


def spread(counts: Sequence[int]) -> dict[str, int] | None:
    """Median, 95th percentile, most and sum of a list of lengths."""
    if not counts:
        return None
    ordered = sorted(counts)
    return {
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "most": ordered[-1],
        "sum": sum(ordered),
    }


def summary(found: Inspection) -> str:
    """What is printed: sizes, then each kind of finding with its first samples."""
    lines = [f"{found.samples:,} samples over {found.images:,} distinct images"]
    tokens, learned = spread(found.lengths), spread(found.learned)
    if tokens:
        lines.append(
            f"tokens a sample: median {tokens['median']:,}, 95 % below {tokens['p95']:,}, most "
            f"{tokens['most']:,} (limit {found.limit:,})"
        )
    if tokens and learned:
        share = 100 * learned["sum"] / tokens["sum"]
        lines.append(f"tokens with loss: {share:.1f} %, median {learned['median']:,} a sample")
    if not tokens:
        lines.append("tokens: not counted, this model's texts have rows of several kinds")
    if not found.findings:
        return "\n".join([*lines, "nothing to complain about"])
    for kind, some in found.kinds().items():
        mark = "STOPS A RUN" if some[0].stops else "look at"
        lines.append(f"{mark:12} {kind}: {len(some):,}")
        lines += [f"             {f.says}" for f in some[:NAMED]]
        lines += [f"             and {len(some) - NAMED:,} more"] * (len(some) > NAMED)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
