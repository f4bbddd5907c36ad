"""Chat templates: a dialogue as text, with the character spans the model has to produce.

Spans come from the template itself, never from counting tokens: from its `{% generation %}` marks
or, where it has none, from growing prefixes of the dialogue.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from triptych.types import DataError, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
HALF = re.compile("[\ud800-\udfff]")  # JSON can hold what no encoding can
IMAGE_MARK = "\ue000"  # stands for an image while text is rendered; private use, never in real text


class Rendered(NamedTuple):
    """A dialogue as one string; `spans` are the (start, end) characters with loss."""

    text: str
    spans: list[tuple[int, int]]


def render(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The whole dialogue, each assistant turn's words and stop token as a span."""
    return render_turns(
        [{"role": m["role"], "content": flatten(m["content"])} for m in messages], tokenizer
    )


def render_turns(turns: list[dict], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Like `render`, for turns whose content is already what the template takes."""
    if MARKS.search(template(tokenizer)):
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[turns],
            chat_template=template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return Rendered(texts[0], [tuple(span) for span in spans[0]])
    return _by_prefixes(turns, tokenizer)


def render_prompt(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """The dialogue up to where the assistant is to speak."""
    turns = [{"role": m["role"], "content": flatten(m["content"])} for m in messages]
    return render_prompt_turns(turns, tokenizer)


def render_prompt_turns(turns: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """Like `render_prompt`, for turns whose content is already what the template takes."""
    return _text(turns, tokenizer, prompt=True)


def flatten(content: list[dict] | str) -> str:
    """A turn's parts as one string, each image as IMAGE_MARK."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    words = []
    for part in parts:
        if part["type"] == "text" and IMAGE_MARK in part["text"]:
            raise DataError(
                "a text holds the private-use character U+E000, which marks images here; remove it."
            )
        if part["type"] == "text" and HALF.search(part["text"]):
            raise DataError("a text holds half of a character, such as a cut emoji; remove it.")
        words.append(IMAGE_MARK if part["type"] == "image" else part["text"])
    # an image ends its line, as in LLaVA's "<image>\n" prompts
    return "".join(
        w + "\n" if w == IMAGE_MARK and follower not in (None, IMAGE_MARK) else w
        for w, follower in zip(words, [*words[1:], None], strict=False)  # an empty turn has none
    )


def template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or a sentence that asks for one."""
    if not tokenizer.chat_template:
        raise TriptychError(
            f"the tokenizer '{tokenizer.name_or_path}' has no chat template; set "
            "model.language.template (with model=hf: model.template) to a .jinja file."
        )
    return tokenizer.chat_template


def _by_prefixes(turns: list[dict], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    full, spans = _text(turns, tokenizer), []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _text(turns[:i], tokenizer, prompt=True)
        after = _text(turns[: i + 1], tokenizer)
        if not (full.startswith(after) and after.startswith(before)):
            raise TriptychError(
                f"the chat template of '{tokenizer.name_or_path}' rewrites earlier turns, so that "
                "what the assistant says cannot be told apart; add {% generation %} marks to it "
                "and set model.language.template (with model=hf: model.template)."
            )
        spans.append((len(before), _after_stop(after, len(before), tokenizer)))
    return Rendered(full, spans)


def _after_stop(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """End of a span: its stop token, so that separators behind it carry no loss."""
    stop = tokenizer.eos_token
    at = text.rfind(stop, start) if stop else -1
    return at + len(stop) if at >= 0 else len(text)


def _text(turns: list[dict], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    template(tokenizer)
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise TriptychError(
            f"the chat template of '{tokenizer.name_or_path}' refuses this dialogue: {error}"
        ) from error
