"""Official checkpoints in and out: `from_hf`, `to_hf`, and `python -m triptych.interop export`."""

from __future__ import annotations

from typing import Any

__all__ = ["from_hf", "to_hf"]


def __getattr__(name: str) -> Any:
    # importing one family's table must not import them all
    if name in __all__:
        from triptych.interop import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'triptych.interop' has no attribute '{name}'")
