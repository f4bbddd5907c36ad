"""Stored region features in the place of a vision encoder (OSCAR's frozen, offline detector)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from triptych.data.processor import ImageLoader
from triptych.data.transforms import ImageTransform
from triptych.types import DataError, ImageFeatures, ImageRef, Images, Sample, TriptychError

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
