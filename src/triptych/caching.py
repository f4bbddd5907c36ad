"""Which images a run reads from a cache: features of a frozen encoder, or decoded pixels."""

from __future__ import annotations

from omegaconf import DictConfig

from triptych.build import Adapted
from triptych.data import cache_room
from triptych.data.cache import FeatureCache, cache_dir
from triptych.data.datamodule import DataModule
from triptych.data.pixels import PixelCache
from triptych.data.transforms import ImageTransform


def use_cache(cfg: DictConfig, adapted: Adapted, data: DataModule) -> None:
    """Compute the features of a frozen vision encoder once, before training reads them."""
    vision = getattr(adapted.model, "vision", None)
    # a library's own processor brings no features, and region parts read in their own way
    if vision is None or not hasattr(data.processor, "images") or hasattr(vision, "loader"):
        return
    if any(p.requires_grad for p in vision.parameters()) or not cfg.cache.features:
        use_pixel_cache(cfg, data)
        return
    cache = FeatureCache(cache_dir() / "features", vision, adapted.bases["vision"])
    cache_room.make_room(cache_dir(), cfg.cache.keep_gb, used=cache.folder)
    refs = data.references()
    if refs is None:
        print("Training images come as a stream; their features are not cached.")
    elif cache.fill(refs, cfg.cache.limit_gb):
        data.processor.images.cached = cache
    else:
        print(f"Features would take more than cache.limit_gb={cfg.cache.limit_gb}; not cached.")


def use_pixel_cache(cfg: DictConfig, data: DataModule) -> None:
    """Decode the images once, where pixels are what the vision encoder has to read each time."""
    refs, transform = data.references(), getattr(data.processor.images, "transform", None)
    if not cfg.cache.pixels or refs is None or not isinstance(transform, ImageTransform):
        return
    steps = cfg.trainer.max_steps * data.batch_size * data.accumulate
    if cfg.trainer.max_epochs == 1 or 0 < steps <= len(data.plan):
        return  # each image is read once, or nearly
    cache = PixelCache(cache_dir() / "pixels", transform)
    if len(data.reader) * cache.item_bytes > cfg.cache.limit_gb * 2**30:
        return  # not even looked at: millions of files would be read to count their images
    cache_room.make_room(cache_dir(), cfg.cache.keep_gb, used=cache.folder)
    if cache.fill(refs, cfg.cache.limit_gb):
        data.processor.images.pixels = cache
