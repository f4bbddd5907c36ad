"""Use without training: `triptych.load(run_or_preset)`, then `.answer` and `.embed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from triptych.build import build_model
from triptych.bundle import compose_preset, find_bundle, load_bundle
from triptych.errors import ConfigError
from triptych.models.base import Model
from triptych.types import ImageRef, Sample, TriptychError, assistant, user

if TYPE_CHECKING:
    from PIL.Image import Image

    Pictures = str | Path | Image | ImageRef | Sequence[str | Path | Image | ImageRef]


@dataclass
class Loaded:
    """A model ready to be used, trained or not."""

    model: Model
    processor: Any
    cfg: DictConfig

    def answer(
        self,
        image: Pictures | None,
        prompt: str | Sequence[str],
        batch_size: int = 8,
        **decoding: Any,
    ) -> str | list[str]:
        """What the model says of an image (path or picture) to a prompt; greedy by default.

        Several images, or several prompts, give a list; both together go in pairs, so they are as
        many. `image=None` asks without a picture. decoding: max_new_tokens, do_sample, num_beams...
        """
        images, prompts = _listed(image), _listed(prompt)
        count = max(len(images), len(prompts))
        if len(images) not in (1, count) or len(prompts) not in (1, count):
            raise TriptychError(
                f"{len(images)} images and {len(prompts)} prompts do not pair; give one of either, "
                "or as many of both."
            )
        images, prompts = images * (count // len(images)), prompts * (count // len(prompts))
        answers = self.ask(
            [_question(i, p, n) for n, (i, p) in enumerate(zip(images, prompts, strict=True))],
            batch_size,
            **decoding,
        )
        return answers if _several(image) or _several(prompt) else answers[0]

    def ask(self, samples: Sequence[Sample], batch_size: int = 8, **decoding: Any) -> list[str]:
        """The model's next turn of each sample, in batches whose size changes no answer."""
        from triptych.evaluation.model_predictor import ModelPredictor

        if not hasattr(self.model, "generate"):
            raise TriptychError(
                f"model={self.cfg.model.name} writes no answers; use .embed, or another model."
            )
        predictor = ModelPredictor(self.model, self.processor, batch_size, self._device)
        return predictor.generate(samples, **decoding)

    def caption(self, image: Pictures, batch_size: int = 8, **decoding: Any) -> str | list[str]:
        """A description of each image; greedy by default."""
        return self.answer(image, "", batch_size, **decoding)

    def choose(self, image: Pictures, prompt: str, candidates: Sequence[str]) -> str | list[str]:
        """The likeliest of some answers to a prompt about each image."""
        from triptych.evaluation.model_predictor import ModelPredictor

        if getattr(self.model, "language", None) is None:
            raise TriptychError(
                f"model={self.cfg.model.name} has no language model to rank answers by; use .match "
                "or .embed, or another model."
            )
        samples = [_question(i, prompt, n) for n, i in enumerate(_listed(image))]
        predictor = ModelPredictor(self.model, self.processor, device=self._device)
        ranked = predictor.loglikelihood(samples, [list(candidates)] * len(samples))
        best = [max(range(len(candidates)), key=[s.sum for s in row].__getitem__) for row in ranked]
        chosen = [candidates[i] for i in best]
        return chosen if _several(image) else chosen[0]

    @torch.inference_mode()
    def match(self, images: Pictures, texts: str | Sequence[str]) -> Tensor:
        """(N,) probability that each text is true of its image; one of either serves for all."""
        if not hasattr(self.model, "match"):
            raise TriptychError(
                f"model={self.cfg.model.name} has no match head; compare .embed of both, or use "
                "blip or blip2_stage1."
            )
        pictures, words = _listed(images), _listed(texts)
        count = max(len(pictures), len(words))
        if len(pictures) not in (1, count) or len(words) not in (1, count):
            raise TriptychError(f"{len(pictures)} images and {len(words)} texts do not pair.")
        pairs = zip(pictures * (count // len(pictures)), words * (count // len(words)), strict=True)
        samples = [
            Sample([user("", images=1), assistant(w)], [_reference(p)], id=f"pair {n}")
            for n, (p, w) in enumerate(pairs)
        ]
        self.model.eval()
        batch = self.processor.collate(samples).to(self._device)
        return self.model.match(batch).float().softmax(-1)[:, 1].cpu()

    @torch.inference_mode()
    def embed(
        self,
        images: Pictures | None = None,
        texts: str | Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Embeddings of images or of texts in their shared space, one row each, of unit norm.

        (N,E), or (N,K,E) for images that have K > 1 embeddings, on the CPU in float32.
        """
        if (images is None) == (texts is None):
            raise TriptychError("embed takes images=... or texts=..., one of the two.")
        if not hasattr(self.model, "embed_images"):
            raise TriptychError(
                f"model={self.cfg.model.name} writes answers and has no space that images and "
                "texts share; use .answer, or a model such as clip."
            )
        self.model.eval()
        items, one = (
            (_listed(texts), self._texts) if images is None else (_listed(images), self._images)
        )
        parts = [one(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]
        return torch.cat(parts).float().cpu()

    def _images(self, pictures: list[Any]) -> Tensor:
        refs = [_reference(p) for p in pictures]
        images, index = self.processor.images([Sample([], [r], id=r.name) for r in refs])
        embedded = self.model.embed_images(images.to(self._device))  # (U,K,E)
        rows = embedded[[index[ref.key] for ref in refs]]
        return rows[:, 0] if rows.shape[1] == 1 else rows

    def _texts(self, texts: list[str]) -> Tensor:
        tokens = self.processor.encode(texts, self.processor.max_length)
        return self.model.embed_texts(tokens.to(self._device))

    @property
    def _device(self) -> torch.device:
        # weights that a device map put on disk are on no device
        placed = (p.device for p in self.model.parameters() if not p.is_meta)
        return next(placed, torch.device("cpu"))


def load(
    run_or_preset: str | Path, overrides: Sequence[str] = (), device: str | None = None
) -> Loaded:
    """A run directory, a bundle, a preset ("llava", "clip/b32") or "hf:ID_OR_FOLDER", to use.

    overrides: options as on the command line, for presets. device: null keeps the CPU, or where
    `model.device_map` put the weights.
    """
    name = str(run_or_preset)
    folder = None if name.startswith("hf:") else find_bundle(name)
    if folder is not None:
        if overrides:
            raise TriptychError(
                f"the run '{name}' has its own configuration; it takes no overrides."
            )
        cfg, adapted = load_bundle(folder)
    else:
        try:
            cfg = compose_preset(name, overrides)
        except ConfigError as error:
            if not Path(name).is_dir():
                raise
            raise TriptychError(
                f"'{name}' is no run: it holds no bundle/bundle.json; for a model's folder write "
                f"'hf:{name}'."
            ) from error
        adapted = build_model(cfg)
    if device is not None:
        adapted.model.to(device)
    adapted.model.eval()
    return Loaded(adapted.model, adapted.model.processor(), cfg)


def _question(image: Any, prompt: str, number: int) -> Sample:
    refs = [] if image is None else [_reference(image)]
    name = f"{refs[0].name} {number}" if refs else f"prompt {number}"
    return Sample([user(prompt, images=len(refs))], refs, id=name)


def _reference(image: Any) -> ImageRef:
    if isinstance(image, ImageRef):
        return image
    if isinstance(image, (str, Path)):
        return ImageRef.from_file(image)
    return ImageRef.from_picture(image)


def _several(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _listed(value: Any) -> list[Any]:
    values = list(value) if _several(value) else [value]
    if not values:
        raise TriptychError("there is nothing to answer or embed: the list is empty.")
    return values
