"""From a picture to the uint8 tensor a vision encoder normalises on its own device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from triptych.types import ImageRef, TriptychError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig

MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageTransform:
    """Resize to a fixed size as uint8; scale to [0,1] and normalise per batch.

    fit: "crop" resizes the shorter side and cuts the centre (CLIP), "pad" squares the picture
    with its mean colour (LLaVA-1.5), "squash" ignores the aspect ratio (SigLIP, ViT).
    decode: "draft" reads a JPEG of twice the size or more at a fraction of it and resizes as a
    tensor (docs/performance.md has the difference in pixels); "exact" decodes all of it and
    resizes with Pillow, as the papers' code did.
    """

    size: tuple[int, int] = (224, 224)  # (H,W) pixels
    fit: Literal["crop", "pad", "squash"] = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: int = Image.Resampling.BICUBIC
    decode: Literal["draft", "exact"] = "draft"

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "pad", "squash"):
            raise TriptychError(f"transform.fit is '{self.fit}'; it takes crop, pad or squash.")
        if self.decode not in ("draft", "exact"):
            raise TriptychError(f"transform.decode is '{self.decode}'; it takes draft or exact.")
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))

    def __call__(self, picture: Image.Image) -> Tensor:
        """(3,H,W) uint8 from an RGB picture."""
        height, width = self.size
        if picture.size != (width, height):
            picture = getattr(self, f"_{self.fit}")(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def read(self, ref: ImageRef) -> Tensor:
        """(3,H,W) uint8 from a reference, decoded no larger than is needed."""
        if self.decode == "exact" or not ref.drafts:
            return self(ref.open())
        needed = max(self.size)
        picture = ref.open(draft=needed)
        if self.fit == "pad" or min(picture.size) < needed or self.resample not in MODES:
            return self(picture)
        return self._resized(picture)

    def _resized(self, picture: Image.Image) -> Tensor:
        """As `__call__`, resized as a tensor: the same filter, rounded once an axis."""
        height, width = self.size
        target = self._cover(picture) if self.fit == "crop" else (width, height)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        if picture.size != target:
            mode = MODES[self.resample]
            pixels = F.interpolate(pixels, target[::-1], mode=mode, antialias=True)
        left, top = (target[0] - width) // 2, (target[1] - height) // 2
        return pixels[0, :, top : top + height, left : left + width].contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """(U,3,H,W) float32 from uint8."""
        mean, std = (pixels.new_tensor(v, dtype=torch.float32) for v in (self.mean, self.std))
        made = pixels.to(torch.float32, copy=True)
        return made.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])

    def _squash(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.size[1], self.size[0]), self.resample)

    def _pad(self, picture: Image.Image) -> Image.Image:
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(int(255 * m) for m in self.mean))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return self._squash(canvas)

    def _crop(self, picture: Image.Image) -> Image.Image:
        (height, width), resized = self.size, self._cover(picture)
        picture = picture.resize(resized, self.resample)
        left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def _cover(self, picture: Image.Image) -> tuple[int, int]:
        """(W,H) of the picture resized until it covers the target."""
        height, width = self.size
        scale = max(width / picture.width, height / picture.height)
        # int, not round: torchvision and transformers truncate the longer side
        return max(width, int(picture.width * scale)), max(height, int(picture.height * scale))

    def to_library(self) -> BaseImageProcessor:
        """The image processor of transformers that does the same."""
        from transformers import CLIPImageProcessor, LlavaImageProcessor

        height, width = self.size
        whole = {"height": height, "width": width}
        # a crop resizes the shorter side first
        size = {"shortest_edge": max(height, width)} if self.fit == "crop" else whole
        more = {"do_pad": True} if self.fit == "pad" else {}
        make = LlavaImageProcessor if self.fit == "pad" else CLIPImageProcessor
        return make(
            size=size,
            crop_size=whole,
            do_center_crop=self.fit == "crop",
            image_mean=list(self.mean),
            image_std=list(self.std),
            resample=self.resample,
            do_convert_rgb=True,
            **more,
        )

    @classmethod
    def of(cls, weights: str | None, config: PreTrainedConfig) -> ImageTransform:
        """The transform a checkpoint's preprocessor_config.json states, or CLIP's at its size."""
        from triptych.parts.pretrained import resolve

        stated = _read(resolve(weights)) if weights else {}
        side = getattr(config, "image_size", None) or 224
        size = stated.get("crop_size") if stated.get("do_center_crop") else stated.get("size")
        fit = "crop" if stated.get("do_center_crop", not stated) else "squash"
        fit = "pad" if stated.get("do_pad") else fit  # LlavaImageProcessor: square, then resize
        return cls(
            size=_pair(size or side),
            fit=fit,
            mean=tuple(stated.get("image_mean", CLIP_MEAN)),
            std=tuple(stated.get("image_std", CLIP_STD)),
            resample=stated.get("resample", Image.Resampling.BICUBIC),
        )


def _read(weights: str) -> dict[str, Any]:
    if torch.get_default_device().type == "meta" and not Path(weights).is_dir():
        return {}  # a dry run asks no network
    from transformers.utils import cached_file

    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(weights, name, _raise_exceptions_for_missing_entries=False)
        stated = json.loads(Path(path).read_text()) if path else {}
        stated = stated.get("image_processor", stated)
        if "image_mean" in stated or "size" in stated:
            return stated
    return {}


def _pair(size: int | dict | list | tuple) -> tuple[int, int]:
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        return (size.get("height", side), size.get("width", side))
    return (size, size) if isinstance(size, int) else tuple(size)
