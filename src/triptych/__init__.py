"""Triptych: vision-language models as three hinged panels, one trainer and one evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.api import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # `import triptych` stays light: torch and transformers load with the first model.
    if name == "load":
        from triptych.api import load

        return load
    raise AttributeError(f"module 'triptych' has no attribute '{name}'")
