"""The processors of Idefics and Idefics2, called and answering like the library's later ones.

Masks follow characters from a rendered dialogue into the text that is tokenised, for which later
processors report how each image's mark was expanded. These two do not, and the first takes lists
of words and pictures instead of marks in a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from triptych.types import TriptychError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BatchFeature, ProcessorMixin

MARK, FAKE, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"


class Reporting:
    """A processor of the library that is called with marks and reports what became of them."""

    image_token = MARK

    def __init__(self, library: ProcessorMixin) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        if name == "library" or name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.library, name)


class Idefics(Reporting):
    """IdeficsProcessor: its three tokens an image, its padding of images and its image mask.

    A token sees the latest image before it, and none behind the end of a document.
    """

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer beside the end of a document, which would hide the images."""
        return [self.tokenizer.convert_tokens_to_ids(END)] * (END in self.tokenizer.get_vocab())

    def __call__(
        self,
        text: list[str],
        images: Sequence[Sequence[Image]] | None = None,
        padding_side: str = "right",
        return_offsets_mapping: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Rows (B,T) behind a first token; pixels (B,M,3,H,W); who sees which image (B,T,M)."""
        expanded = [expand(t, MARK + FAKE, _nothing) for t in text]
        first = "" if text[0].startswith(self.tokenizer.bos_token) else self.tokenizer.bos_token
        out = dict(
            self.tokenizer(
                [first + t for t, _ in expanded],
                add_special_tokens=False,
                padding=True,
                padding_side=padding_side,
                return_offsets_mapping=return_offsets_mapping,
                return_tensors="pt",
            )
        )
        if return_offsets_mapping:  # in the text without its first token
            out["offset_mapping"] = (out["offset_mapping"] - len(first)).clamp_min(0)
        out["text_replacement_offsets"] = [replaced for _, replaced in expanded]
        return out | self._images(images or [[] for _ in text], out["input_ids"])

    def _images(
        self, images: Sequence[Sequence[Image]], ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        from transformers.models.idefics import processing_idefics as theirs

        most = max(1, *map(len, images))
        pixels = torch.zeros(len(images), most, *self.default_image_dims)
        for row, own in enumerate(images):
            if own:
                pixels[row, : len(own)] = self.image_processor(list(own), return_tensors="pt")
        latest, _ = theirs.image_attention_mask_for_packed_input_ids(ids, self.tokenizer, "pt")
        mask = theirs.incremental_to_binary_attention_mask(latest, "pt", num_classes=most)
        return {"pixel_values": pixels, "image_attention_mask": mask}


class Idefics2(Reporting):
    """Idefics2Processor, with where each mark went."""

    def __call__(
        self,
        text: list[str],
        images: Sequence[Sequence[Image]] | None = None,
        return_text_replacement_offsets: bool = False,
        **options: Any,
    ) -> BatchFeature:
        """The library's own output and, if asked for, the expansions of each text."""
        out = self.library(text=text, images=images, **options)
        if return_text_replacement_offsets:
            copies = 5 if self.image_processor.do_image_splitting else 1
            body = (MARK * self.image_seq_len + FAKE) * copies
            expanded = [expand(t, body, _space) for t in text]
            ends = out["offset_mapping"][..., 1].amax(1).tolist()
            if ends != [len(t) for t, _ in expanded]:
                raise TriptychError(
                    "Idefics2's processor expands images in another way than its masks expect; "
                    "install the version of transformers that requirements.txt names."
                )
            out["text_replacement_offsets"] = [replaced for _, replaced in expanded]
        return out


def reporting(library: ProcessorMixin) -> Any:
    """The processor itself, unless it is one of the two."""
    wrapped = {"IdeficsProcessor": Idefics, "Idefics2Processor": Idefics2}
    return wrapped.get(type(library).__name__, lambda same: same)(library)


def expand(text: str, body: str, gap: Callable[[str], str]) -> tuple[str, list[dict]]:
    """A text with FAKE, body and gap for each mark, and the spans before and after.

    A mark right behind another shares its FAKE. gap: what is put in front of the character that
    follows.
    """
    made, at, replaced = "", 0, []
    for number, found in enumerate(re.finditer(MARK, text)):
        start, end = found.span()
        made += text[at:start]
        new = ("" if number and start == at else FAKE) + body + gap(text[end : end + 1])
        span = (len(made), len(made) + len(new))
        replaced.append({"text": MARK, "span": (start, end), "new_span": span})
        made, at = made + new, end
    return made + text[at:], replaced


def _nothing(follower: str) -> str:
    return ""


def _space(follower: str) -> str:
    return " " if re.match(r"[^\s<]", follower) else ""
