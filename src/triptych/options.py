"""Options of the small command-line tools: `name=value` words, alone or beside train.py's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from triptych.types import TriptychError


def run_tool(
    run: Callable[[list[str]], int], text: str | None, argv: Sequence[str] | None = None
) -> int:
    """The exit code of a tool that takes words; without any, or with -h, its text is printed.

    A TriptychError is one sentence and exit code 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(text)
        return 0 if words else 2
    try:
        return run(words)
    except TriptychError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def read_options(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Values by name. Raises TriptychError for a word that is none of the known options."""
    options = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise TriptychError(f"'{word}' is no option; use {', '.join(f'{o}=' for o in known)}")
        options[name] = value
    return options


def beside_training(
    words: Sequence[str], known: Sequence[str]
) -> tuple[dict[str, str], str, list[str]]:
    """A tool's own options by name, the model, and the other words, which train.py takes."""
    own, model, rest = {}, "llava", []
    for word in words:
        name, _, value = word.partition("=")
        if name in known:
            own[name] = value
        elif name == "model":
            model = value
        else:
            rest.append(word)
    return own, model, rest


def whole_number(options: dict[str, str], name: str, default: int, least: int = 1) -> int:
    """The value of a numeric option."""
    value = options.get(name, str(default))
    if not value.isdigit() or int(value) < least:
        raise TriptychError(f"{name}={value} must be a number from {least}.")
    return int(value)
