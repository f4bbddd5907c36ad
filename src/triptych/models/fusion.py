"""How visual tokens enter a language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triptych.types import Batch, TriptychError, VisualTokens

IMAGE = -200  # the placeholder id: outside every vocabulary, so no table is ever resized


class Prefix(nn.Module):
    """Visual tokens stand among the text tokens, at their placeholders (LLaVA, BLIP-2, Qwen-VL)."""

    def placeholders(self, q: int) -> int:
        """How many placeholder ids an image of q visual tokens takes in the row."""
        return q

    def forward(self, embeds: Tensor, visual: VisualTokens, batch: Batch) -> tuple[Tensor, Any]:
        """Overwrite the placeholders' embeddings (B,T,D) with visual tokens (sum Q, D)."""
        places = (batch.text["language"].ids == IMAGE).nonzero(as_tuple=True)  # reading order
        if len(places[0]) != len(visual.tokens):
            raise TriptychError(
                f"{len(places[0])} image placeholders but {len(visual.tokens)} visual tokens in "
                f"the batch of samples {batch.ids}; the data's connector and the model's differ."
            )
        return embeds.index_put(places, visual.tokens.to(embeds.dtype)), None
