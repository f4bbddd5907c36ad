"""Options of the small command-line tools: `name=value` words, without a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.types import TriptychError


def read_options(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Values by name. Raises TriptychError for a word that is none of the known options."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise TriptychError(f"'{word}' is no option; use {', '.join(f'{o}=' for o in known)}")
        options[name] = value
    return options
