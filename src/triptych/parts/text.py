"""Text encoders for contrastive models: any Hugging Face text tower, pooled to one vector."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from triptych.parts import pooled_block
from triptych.parts.language import load_tokenizer
from triptych.parts.pretrained import load_model, outline, read_config, unreached
from triptych.types import Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
CAUSAL = ("clip_text_model",)  # towers whose tokens look backwards only
LIMIT = 512  # tokens of a caption where neither tower nor tokenizer states a limit


class TextEncoder(nn.Module):
    """A text tower whose rows are single captions; D is its pooled width.

    pooling: "model" takes the tower's own pooled output (CLIP's end token, SigLIP's last),
    "mean" averages the tokens (sentence encoders), "first" takes [CLS] (BERT, ALIGN), "last" the
    last token of each caption (causal towers).
    config: a model_type and sizes; without vocab_size a new tower takes its tokenizer's.
    max_length: tokens kept of a caption, special tokens included.
    padding: "longest" trims a batch to its longest caption; "max_length" fills every row up, and
    the padding is read like words, as SigLIP was trained.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: dict | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        pooling: Literal["model", "mean", "first", "last"] = "model",
        padding: Literal["longest", "max_length"] = "longest",
        max_length: int | None = None,
        model_class: str | None = None,
        attention: str = "sdpa",
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        from hydra.utils import get_class
        from transformers import AutoModel

        if pooling not in ("model", "mean", "first", "last"):
            raise TriptychError(
                f"text.pooling is '{pooling}'; it takes model, mean, first or last."
            )
        if padding not in ("longest", "max_length"):
            raise TriptychError(f"text.padding is '{padding}'; it takes longest or max_length.")
        self._tokenizer, self._revision = tokenizer or weights, revision
        if config and "vocab_size" not in config and weights is None and tokenizer:
            config = {**config, **self._vocabulary()}
        self.config = read_config(config, weights, "text_config")
        self._auto = get_class(model_class) if model_class else AutoModel
        self.model = load_model(self._auto, self.config, weights, revision, attention, dtype)
        self.pooling, self.padding = pooling, padding
        self.max_length = max_length or getattr(self.config, "max_position_embeddings", LIMIT)
        self.unused: tuple[str, ...] = ()
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        self._one_token = pooled_block.enable(max(lists, key=len, default=None))

    @cached_property
    def dim(self) -> int:
        """D, the width of a caption's vector."""
        return self._outline[1].shape[1]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._tokenizer, revision=self._revision)

    def _vocabulary(self) -> dict[str, int]:
        """Size and special ids of the tokenizer, for a tower that starts from nothing."""
        ids = {name: getattr(self.tokenizer, name) for name in _SPECIAL}
        return {
            "vocab_size": len(self.tokenizer),
            **{n: i for n, i in ids.items() if i is not None},
        }

    def forward(self, tokens: Tokens) -> Tensor:
        """(B,D) from (B,T) captions padded on the right."""
        read = self._read(tokens.ids, tokens.mask) if self._one_token else None
        return self._pooled(self.model, tokens.ids, tokens.mask, read)

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """(B,) the token that the pooling looks at, as the tower finds it; None = it reads more."""
        if self.pooling == "last":
            return mask.sum(1) - 1
        if self.pooling == "first":
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        if self.pooling == "model" and self.config.model_type == "clip_text_model":
            end = self.config.eos_token_id  # 2 stands for "the highest id" in old checkpoints
            return ids.argmax(1) if end == 2 else (ids == end).int().argmax(1)
        if self.pooling == "model" and self.config.model_type == "siglip_text_model":
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        return None

    def _pooled(
        self, model: nn.Module, ids: Tensor, mask: Tensor, read: Tensor | None = None
    ) -> Tensor:
        seen: Tensor | None = mask.long()
        if ids.is_meta:  # the library looks into a mask of two dimensions, which "meta" cannot
            seen = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        elif self.config.model_type in CAUSAL:
            seen = None  # padding stands behind every word, where no word looks
        out = model(input_ids=ids, attention_mask=seen, **({} if read is None else {"read": read}))
        if self.pooling == "model":
            if getattr(out, "pooler_output", None) is None:
                raise TriptychError(
                    f"{type(model).__name__} has no pooled output; set text.pooling to mean, first "
                    "or last."
                )
            return out.pooler_output
        hidden = out.last_hidden_state  # (B,T,D)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        weight = mask[..., None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)

    def encode(self, texts: list[str], max_length: int | None = None) -> Tokens:
        """Captions as padded rows, trimmed to the longest of the batch unless `padding` says no."""
        limits = (self.max_length, max_length, self.tokenizer.model_max_length)
        rows = self.tokenizer(
            texts,
            padding=self.padding,
            padding_side="right",
            truncation=True,
            max_length=min(limit for limit in limits if limit),
            return_tensors="pt",
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]
        if self.padding == "max_length":
            mask = torch.ones_like(mask)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return Tokens(ids=ids, positions=positions, segments=mask.long())

    def unreached(self) -> tuple[str, ...]:
        """What this pooling never reads, such as BERT's pooler under "mean"."""
        return tuple(f"model.{name}" for name in unreached(*self._outline))

    @cached_property
    def _outline(self) -> tuple[nn.Module, Tensor]:
        """A weightless copy of the tower and its pooled output (1,D), on the meta device."""
        with torch.device("meta"):
            model = outline(self._auto, self.config)
            ids = torch.zeros(1, 2, dtype=torch.long)
            return model, self._pooled(model, ids, torch.ones_like(ids))
