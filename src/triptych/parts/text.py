"""Text encoders for contrastive models: any Hugging Face text tower, pooled to one vector."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from triptych.parts.language import load_tokenizer
from triptych.parts.pretrained import load_model, read_config
from triptych.types import Tokens, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEncoder(nn.Module):
    """A text tower whose rows are single captions; D is its pooled width.

    pooling: "model" takes the tower's own pooled output (CLIP's end token, SigLIP's last),
    "mean" averages the tokens (sentence encoders), "first" takes [CLS] (BERT, ALIGN), "last" the
    last token of each caption (causal towers).
    max_length: tokens kept of a caption, special tokens included.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: dict | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        pooling: Literal["model", "mean", "first", "last"] = "model",
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
        self.config = read_config(config, weights, "text_config")
        auto = get_class(model_class) if model_class else AutoModel
        self.model = load_model(auto, self.config, weights, revision, attention, dtype)
        self.pooling = pooling
        self.max_length = max_length or self.config.max_position_embeddings
        self.unused: tuple[str, ...] = ()
        self._tokenizer, self._revision = tokenizer or weights, revision

    @property
    def dim(self) -> int:
        return self.config.hidden_size

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._tokenizer, revision=self._revision)

    def forward(self, tokens: Tokens) -> Tensor:
        """(B,D) from (B,T) captions padded on the right."""
        out = self.model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
        if self.pooling == "model":
            return out.pooler_output
        hidden = out.last_hidden_state  # (B,T,D)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), tokens.mask.sum(1) - 1]
        mask = tokens.mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)

    def encode(self, texts: list[str], max_length: int | None = None) -> Tokens:
        """Captions as padded rows, trimmed to the longest of the batch."""
        rows = self.tokenizer(
            texts,
            padding="longest",
            truncation=True,
            max_length=min(self.max_length, max_length or self.max_length),
            return_tensors="pt",
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return Tokens(ids=ids, positions=positions, segments=mask.long())
