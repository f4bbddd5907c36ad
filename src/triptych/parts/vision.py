"""Vision encoders: any Hugging Face vision model as flat tokens that know their own size."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triptych.data.transforms import ImageTransform
from triptych.parts import pooled_block
from triptych.parts.pretrained import load_model, outline, read_config, unreached
from triptych.types import ImageFeatures, Images, TriptychError


class VisionEncoder(nn.Module):
    """A vision tower: uint8 pictures in, tokens of one hidden layer out.

    layer: index into the hidden states, as in LLaVA (-2 = the second-last; 0 = the embeddings).
    select: "patch" drops the class and register tokens, "cls_patch" keeps them (LLaVA's names).
    model_class: a dotted class for towers that have no Auto entry.
    prefix: where the tower stands in a checkpoint that holds more, such as "vision_model".
    statistics: what BatchNorm layers divide by in training: those of the "batch", or the "stored"
    ones, as is usual when a trained tower is tuned; then chunks and ranks change nothing.

    `dim`, `num_tokens` and the image transform come from the model, never from the YAML.
    """

    def __init__(
        self,
        weights: str | None = None,
        config: dict | None = None,
        revision: str | None = None,
        layer: int = -1,
        select: Literal["patch", "cls_patch"] = "patch",
        transform: ImageTransform | None = None,
        model_class: str | None = None,
        attention: str = "sdpa",
        dtype: str = "float32",
        prefix: str | None = None,
        statistics: Literal["batch", "stored"] = "batch",
    ) -> None:
        super().__init__()
        from hydra.utils import get_class
        from transformers import AutoModel

        if select not in ("patch", "cls_patch"):
            raise TriptychError(f"vision.select is '{select}'; it takes patch or cls_patch.")
        if statistics not in ("batch", "stored"):
            raise TriptychError(f"vision.statistics is '{statistics}'; it takes batch or stored.")
        self.statistics = statistics
        auto = get_class(model_class) if model_class else AutoModel
        self.config = read_config(config, weights, "vision_config")
        self.model = load_model(
            auto, self.config, weights, revision, attention, dtype, prefix=prefix
        )
        self.layer, self.select = layer, select
        self.transform = transform or ImageTransform.of(weights, self.config)
        self._auto = auto
        grid, special, self.dim = self._probe(self.transform.size)
        self.grid, self.special = grid, special if select == "patch" else 0
        self.unused = self._skip_unreached()
        self.pooled_only = False

    def read_pooled(self) -> None:
        """Say that only the pooled output is read: a class token's last block then runs for it
        alone, and the other tokens mean nothing."""
        blocks = _blocks(self.model)
        class_token = self.config.model_type == "clip_vision_model" and self.layer == -1
        self.pooled_only = class_token and pooled_block.enable(blocks and blocks[1])

    def forward(self, images: Images) -> ImageFeatures:
        pixels = self.transform.normalize(images.pixels).to(self.model.dtype)  # (U,3,H,W)
        one = {"read": pixels.new_zeros(len(pixels), dtype=torch.long)} if self.pooled_only else {}
        out = self.model(pixel_values=pixels, output_hidden_states=True, **one)
        hidden = _flat(out.hidden_states[self.layer])[:, self.special :]  # (U,P,D)
        counts = torch.full((len(hidden),), hidden.shape[1], device=hidden.device)
        pooled = getattr(out, "pooler_output", None) if self.layer == -1 else None
        if pooled is not None:
            pooled = pooled.flatten(1)  # ResNet: (U,D,1,1)
        return ImageFeatures(hidden.flatten(0, 1), counts, pooled)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Train or evaluate; BatchNorm keeps stored statistics where they were asked for."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and self.statistics == "stored":
                module.training = False
        return self

    def num_tokens(self, height: int, width: int) -> int:
        """P for a picture of this size, after `select`."""
        grid, special, _ = self._probe((height, width))
        return grid + (special if self.select == "cls_patch" else 0)

    @cached_property
    def pooled_dim(self) -> int:
        """Width of the tower's own pooled output."""
        _, pooled = self._outline
        if pooled is None:
            raise TriptychError(
                f"{type(self.model).__name__} has no pooled output at vision.layer={self.layer}; "
                "pool its tokens instead (model.heads.pool)."
            )
        return pooled.shape[1]

    def unreached(self, reads: Literal["pooled", "tokens"]) -> tuple[str, ...]:
        """What neither runs nor trains if only the pooled output, or only the tokens, are read."""
        model, pooled = self._outline
        if reads == "tokens":
            size = self.transform.size
            with torch.device("meta"):
                out = model(pixel_values=torch.empty(1, 3, *size), output_hidden_states=True)
            return tuple(f"model.{n}" for n in unreached(model, out.hidden_states[self.layer]))
        return tuple(f"model.{n}" for n in unreached(model, pooled))

    @cached_property
    def _outline(self) -> tuple[nn.Module, Tensor | None]:
        """A weightless copy of the tower and its pooled output (1,D), on the meta device."""
        with torch.device("meta"):
            model = outline(self._auto, self.config)
            out = model(pixel_values=torch.empty(1, 3, *self.transform.size))
        pooled = getattr(out, "pooler_output", None) if self.layer == -1 else None
        return model, pooled if pooled is None else pooled.flatten(1)

    @lru_cache(maxsize=8)  # noqa: B019  (a tower lives as long as its run)
    def _probe(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(grid tokens, class and register tokens, width), from a weightless run on "meta"."""
        with torch.device("meta"), torch.no_grad():
            model = outline(self._auto, self.config)
            hidden = model(
                pixel_values=torch.empty(1, 3, *size), output_hidden_states=True
            ).hidden_states[self.layer]
        tokens, dim = _flat(hidden).shape[1:]
        patch = getattr(self.config, "patch_size", None)
        if hidden.dim() == 4 or patch is None or self.config.model_type.startswith("swin"):
            return tokens, 0, dim
        patch = patch if isinstance(patch, int) else patch[0]
        grid = (size[0] // patch) * (size[1] // patch)
        return grid, tokens - grid, dim

    def _skip_unreached(self) -> tuple[str, ...]:
        """Turn the blocks above the chosen layer into pass-throughs; name what is never reached.

        The tensors stay for export; they are neither run nor trained.
        """
        blocks = _blocks(self.model)
        depth = getattr(self.config, "num_hidden_layers", None)
        if blocks is None or len(blocks[1]) != depth:
            return ()
        last = self.layer if self.layer >= 0 else depth + 1 + self.layer  # blocks that run
        if last == depth:
            return ()
        for block in blocks[1][last:]:
            block.forward = _pass_through
        heads = ("post_layernorm", "layernorm", "head", "pooler")
        above = tuple(f"model.{blocks[0]}.{i}" for i in range(last, depth))
        return above + tuple(f"model.{n}" for n in heads if hasattr(self.model, n))


def _flat(hidden: Tensor) -> Tensor:
    """(U,P,D) from tokens, or from the (U,D,h,w) map of a convolutional network."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The stack of blocks with its name: the longest ModuleList of the tower."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda item: len(item[1]), default=None)


def _pass_through(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states
