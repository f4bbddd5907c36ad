"""The layouts in which people write dialogues about images, read into chat messages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from triptych.types import DataError

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
_TURN = re.compile(r"^(User|Assistant|System):[ \t]*", re.MULTILINE)
_MARK = re.compile(r"\n?<image>\n?")


def read_dialogue(row: dict, where: str) -> tuple[list[dict], list[str]]:
    """Messages in chat format, and the image paths in the order in which they are seen.

    Reads `text` ("User: ...\\nAssistant: ..."), LLaVA's `conversations`, and chat `messages`.
    Images are named in `image` or `images`, or beside their mark in a part of `messages`. Without
    any mark they stand in front of the first user turn; else marks and images must be as many.
    `where` is what errors call the row.
    """
    inline: list[str] = []  # paths written beside their mark
    messages = [
        {"role": role, "content": _content(body, inline, where)}
        for role, body in _turns(row, where)
    ]
    _check_answers(messages, where)
    paths = _paths(row, where)
    if paths and inline:
        raise DataError(f"{where} names images both in its turns and outside; keep one place.")
    paths = paths or inline
    marks = sum(part["type"] == "image" for m in messages for part in m["content"])
    if paths and not marks:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise DataError(f"{where} has images and no user turn; mark their places by <image>.")
        first["content"] = [{"type": "image"} for _ in paths] + first["content"]
    elif marks != len(paths):
        raise DataError(f"{where} has {marks} <image> marks and {len(paths)} images; match them.")
    return messages, paths


def _check_answers(messages: list[dict], where: str) -> None:
    if not messages:
        raise DataError(f"{where} has an empty dialogue; give a question and its answer.")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError(f"{where} has no assistant turn, so nothing to predict; add the answer.")
    if not any(part["type"] == "text" for m in answers for part in m["content"]):
        raise DataError(f"{where} has only empty assistant turns; add the answer.")


def _turns(row: dict, where: str) -> Iterator[tuple[str, object]]:
    """(role, content) of every turn, in one of the three layouts."""
    for key, speaker, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key not in row:
            continue
        turns = row[key]
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{where}: '{key}' is no list of turns; write [{{...}}, {{...}}].")
        for turn in turns:
            name = str(turn.get(speaker)).lower()
            if name not in ROLES:
                names = ", ".join(ROLES)
                raise DataError(f"{where}: a turn has {speaker}={name!r}; use one of {names}.")
            yield ROLES[name], turn.get(said)
        return
    if "text" not in row:
        raise DataError(f"{where} has no 'messages', 'conversations' or 'text'; add a dialogue.")
    yield from _split_text(row["text"], where)


def _split_text(text: object, where: str) -> Iterator[tuple[str, str]]:
    if not isinstance(text, str):
        raise DataError(f"{where}: 'text' is no string; write 'User: ...\\nAssistant: ...'.")
    marks = list(_TURN.finditer(text))
    if text[: marks[0].start() if marks else None].strip():
        raise DataError(f"{where}: 'text' does not start with 'User:'; name who speaks first.")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=False):
        yield mark[1].lower(), text[mark.end() : end].strip()


def _content(body: object, inline: list[str], where: str) -> list[dict]:
    """The parts of a turn, given as a string with `<image>` marks or as a list of parts."""
    if isinstance(body, str):
        return _split_marks(body)
    if not isinstance(body, list):
        raise DataError(f"{where}: a turn has no text; give a string or a list of parts.")
    content: list[dict] = []
    for part in body:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            content += _split_marks(part["text"])
        elif kind in ("image", "image_url"):
            content.append({"type": "image"})
            path = next((part[k] for k in ("image", "path", "url", "image_url") if k in part), None)
            path = path.get("url") if isinstance(path, dict) else path
            inline += [] if path is None else [_path(path, where)]
        else:
            raise DataError(f"{where}: part {str(part)[:60]!r} is no text or image; correct it.")
    return content


def _split_marks(text: str) -> list[dict]:
    content: list[dict] = []
    for number, piece in enumerate(_MARK.split(text)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    return content


def _paths(row: dict, where: str) -> list[str]:
    given = [row[key] for key in ("image", "images") if row.get(key)]
    if len(given) > 1:
        raise DataError(f"{where} has both 'image' and 'images'; keep one of them.")
    names = given[0] if given else []
    return [_path(name, where) for name in (names if isinstance(names, list) else [names])]


def _path(name: object, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: image {str(name)[:60]!r} is no path; name a file.")
    if name.startswith(("http://", "https://", "data:")):
        raise DataError(
            f"{where}: image '{name[:60]}' is no file; save it below data.images and name it."
        )
    return name
