"""Regions in the place of a grid: stored by a detector, or read from known boxes (OSCAR)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from triptych.data.processor import ImageLoader
from triptych.data.transforms import ImageTransform
from triptych.parts.vision import VisionEncoder
from triptych.types import DataError, ImageFeatures, ImageRef, Images, Sample, TriptychError

if TYPE_CHECKING:
    from PIL.Image import Image

POSITION = 6  # x1, y1, x2, y2, width, height, each as a share of the picture


class RegionFeatures(nn.Module):
    """A folder of detector outputs: D = `feature_dim` + 6, at most `regions` of an image.

    One NAME.npz per image, NAME being the picture's file name without ending: `features`
    (R,feature_dim), `boxes` (R,4) as x1 y1 x2 y2 in pixels, `size` (height, width); best first.
    (Oscar, arXiv 2004.06165, section 3: 2,048 + 6 values, 50 regions.)
    """

    layer, select = -1, "patch"

    def __init__(self, folder: str, feature_dim: int = 2048, regions: int = 50) -> None:
        super().__init__()
        self.folder, self.feature_dim, self.regions = Path(folder), feature_dim, regions
        self.dim = feature_dim + POSITION
        self.transform = ImageTransform()

    def num_tokens(self, height: int, width: int) -> int:
        """Most regions of an image; a row holds a place for each it really has."""
        return self.regions

    def loader(self) -> RegionLoader:
        """What reads the features in the place of pixels."""
        return RegionLoader(self)

    def forward(self, images: Images) -> ImageFeatures:
        raise TriptychError(
            "region features are read from files, and a batch came without them; use the "
            "processor of the model that holds this part."
        )

    def read(self, ref: ImageRef) -> Tensor:
        """(R,D) of one image."""
        path = self.folder / f"{Path(ref.name).stem}.npz"
        if not path.is_file():
            raise DataError(f"region features '{path}' do not exist; check model.vision.folder.")
        try:
            with np.load(path, allow_pickle=False) as file:
                features, boxes, (height, width) = file["features"], file["boxes"], file["size"]
        except (KeyError, ValueError, OSError) as error:
            raise DataError(
                f"region features '{path}' cannot be read ({error}); they need the arrays "
                "features, boxes and size."
            ) from error
        if features.shape[1:] != (self.feature_dim,) or boxes.shape != (len(features), 4):
            raise DataError(
                f"region features '{path}' have shapes {features.shape} and {boxes.shape}; they "
                f"need (R, {self.feature_dim}) and (R, 4)."
            )
        features, boxes = features[: self.regions], boxes[: self.regions].astype(np.float32)
        x1, y1, x2, y2 = boxes.T
        shares = [x1 / width, y1 / height, x2 / width, y2 / height]
        shares += [(x2 - x1) / width, (y2 - y1) / height]
        joined = np.concatenate([features.astype(np.float32), np.stack(shares, 1)], 1)
        return torch.from_numpy(joined.astype(np.float32))


class RegionLoader(ImageLoader):
    """The distinct images of a batch as their stored regions; no picture is opened."""

    def __init__(self, part: RegionFeatures) -> None:
        super().__init__(part.transform)
        self.part = part

    def __call__(self, samples: Sequence[Sample]) -> tuple[Images | None, dict[str, int]]:
        refs = {ref.key: ref for sample in samples for ref in sample.images}
        if not refs:
            return None, {}
        regions = [self.part.read(ref) for ref in refs.values()]
        counts = torch.tensor([len(r) for r in regions])
        features = ImageFeatures(torch.cat(regions), counts)
        return Images(list(refs), features=features), {key: i for i, key in enumerate(refs)}


class BoxFeatures(nn.Module):
    """Regions with no file: the vision tower reads each box that the picture is known to hold.

    D = the tower's width (the mean of a crop's tokens) + the 6 position values of RegionFeatures.
    `ImageRef.boxes` states the boxes, as `data=shapes` does; a picture without any is one region.
    margin: share of a box's sides that is cut out around it.
    """

    def __init__(self, tower: VisionEncoder, regions: int = 50, margin: float = 0.1) -> None:
        super().__init__()
        self.tower, self.regions, self.margin = tower, regions, margin
        self.dim, self.transform = tower.dim + POSITION, tower.transform
        self.layer, self.select = tower.layer, tower.select
        self.unused = tuple(f"tower.{name}" for name in tower.unused)

    def num_tokens(self, height: int, width: int) -> int:
        """Most regions of an image; a row holds a place for each it really has."""
        return self.regions

    def loader(self) -> BoxLoader:
        """What cuts the boxes out."""
        return BoxLoader(self)

    def forward(self, images: Images) -> ImageFeatures:
        """(sum R, D) from crops (sum R,3,H,W), .extra boxes (sum R,6) and regions (U,)."""
        tokens, counts, _ = self.tower(Images([], pixels=images.pixels))
        means = tokens.view(len(counts), -1, tokens.shape[-1]).mean(1)  # (sum R, D-6)
        places = images.extra["boxes"].to(means.dtype)
        return ImageFeatures(torch.cat([means, places], 1), images.extra["regions"])


class BoxLoader(ImageLoader):
    """The distinct images of a batch as crops of their boxes."""

    def __init__(self, part: BoxFeatures) -> None:
        super().__init__(part.transform)
        self.most, self.margin = part.regions, part.margin

    def __call__(self, samples: Sequence[Sample]) -> tuple[Images | None, dict[str, int]]:
        refs = {ref.key: ref for sample in samples for ref in sample.images}
        if not refs:
            return None, {}
        pixels, places, counts = [], [], []
        for ref in refs.values():
            picture = ref.open()
            boxes = ref.boxes[: self.most] or ((0.0, 0.0, 1.0, 1.0),)
            pixels += [self.transform(self._cut(picture, box)) for box in boxes]
            places += [[x1, y1, x2, y2, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]
            counts.append(len(boxes))
        extra = {"boxes": torch.tensor(places), "regions": torch.tensor(counts)}
        images = Images(list(refs), pixels=torch.stack(pixels), extra=extra)
        return images, {key: i for i, key in enumerate(refs)}

    def _cut(self, picture: Image, box: tuple[float, float, float, float]) -> Image:
        (x1, y1, x2, y2), (width, height) = box, picture.size
        dx, dy = self.margin * (x2 - x1), self.margin * (y2 - y1)
        left, top = max(0, int((x1 - dx) * width)), max(0, int((y1 - dy) * height))
        right, bottom = (x2 + dx) * width, (y2 + dy) * height
        right = min(width, max(left + 1, math.ceil(right)))
        return picture.crop((left, top, right, min(height, max(top + 1, math.ceil(bottom)))))
