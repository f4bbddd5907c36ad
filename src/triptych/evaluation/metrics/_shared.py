"""Small helpers of the metrics: arrays from any library, and one-sentence errors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from triptych.types import TriptychError


def mistake(sentence: str) -> TriptychError:
    """The error to raise for input that cannot be scored; `sentence` names it and the fix."""
    from triptych.types import TriptychError  # here, because types.py imports torch

    return TriptychError(sentence)


def as_array(values: Any) -> np.ndarray:
    """A numpy array of lists, arrays or tensors; half precision becomes float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) in ("torch.bfloat16",) else values
        values = values.numpy()
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def choose(rule: str, rules: Iterable[str], metric: str) -> str:
    """Return `rule` if it is one of `rules`; else the error names the valid ones."""
    rules = tuple(rules)
    if rule not in rules:
        raise mistake(f"{metric}: rule '{rule}' is unknown; use one of {', '.join(rules)}.")
    return rule


def same_ids(left: Mapping[Hashable, Any], right: Mapping[Hashable, Any], metric: str) -> None:
    """Refuse two mappings whose ids differ: scores are joined by id, never by order."""
    if not left:
        raise mistake(f"{metric}: there is nothing to score; pass at least one id.")
    odd = [str(key) for key in (*left, *right) if (key in left) != (key in right)]
    if odd:
        shown = ", ".join(odd[:5]) + (" ..." if len(odd) > 5 else "")
        raise mistake(f"{metric}: both sides must hold the same ids, but {shown} is on one only.")
