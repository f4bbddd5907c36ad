"""CLIP's vision transformer without a class token: the tower of the first Qwen-VL."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from triptych.parts.resampler import resized

POSITIONS = 256  # 16 x 16, whatever the picture's size


class PatchVisionModel(CLIPVisionModel):
    """CLIPVisionModel whose stream holds patches alone, at positions resized to their grid.

    Layout of Qwen-VL's `visual.py` (VisionTransformer): no class token, no norm behind the blocks.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = PatchEmbeddings(config)
        self.post_layernorm = nn.Identity()
        self.post_init()


class PatchEmbeddings(nn.Module):
    """(U,P,D) from pixels (U,3,H,W)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding(POSITIONS, config.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (U,P,D)
        if patches.is_meta:
            return patches + torch.empty_like(patches[0])
        return patches + resized(self.position_embedding.weight, patches.shape[1])
