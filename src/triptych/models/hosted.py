"""HostedVLM: any image-text-to-text class of transformers as a model of this project.

Its parts are not recomposed: models compute their own positions (M-RoPE), masks (PaliGemma's
prefix) and tilings, so the class runs whole and only its tensors are told apart by role.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triptych.data.hosted_processor import HostedProcessor
from triptych.interop.hosted_roles import UNSCALED, find_roles, reach
from triptych.models.base import Model
from triptych.parts.language import finish_logits
from triptych.parts.pretrained import load_model, read_config, resolve
from triptych.types import Batch, TriptychError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Borrowed(nn.Module):
    """Modules of a library model under one role.

    They stay the library's own: what replaces one here (a quantized layer, an adapter) replaces it
    there, so that the library's forward runs it.
    """

    def __init__(self, library: PreTrainedModel, paths: Sequence[str]) -> None:
        super().__init__()
        self.__dict__["_library"] = library  # not registered: its tensors already have roles
        self.__dict__["_places"] = {}
        for path in paths:
            name = path.rpartition(".")[2]
            while name in self._places:
                name += "_"
            value = reach(library, path)
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value, persistent=path in library.state_dict())
            self._places[name] = path

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        path = self.__dict__.get("_places", {}).get(name)
        if path is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(self._library.get_submodule(parent), leaf, value)


class HostedLanguage(Borrowed):
    """The decoder with its embeddings and its head, which is called apart."""

    attention = "causal"

    def __init__(self, library: PreTrainedModel, paths: Sequence[str]) -> None:
        super().__init__(library, paths)
        self.scaled = library.config.model_type not in UNSCALED

    @property
    def dim(self) -> int:
        """D, the width of an input embedding."""
        return self._library.get_input_embeddings().embedding_dim

    @property
    def head(self) -> nn.Module:
        return self._library.get_output_embeddings()

    def logits(self, hidden: Tensor) -> Tensor:
        """(...,V) from (...,D) as the class computes them."""
        return self.finish(self.head(hidden))

    def finish(self, logits: Tensor) -> Tensor:
        """The scale or cap that follows the head."""
        return (
            finish_logits(logits, self._library.config.get_text_config()) if self.scaled else logits
        )


class HostedVLM(Model):
    """A model by its hub id or folder (`model=hf model.id=...`), trained and evaluated by role.

    template: a .jinja file or its text, in place of the processor's chat template. dtype: a torch
    dtype, or "auto" for this hardware's fast one. device_map: "auto" spreads a large model over
    the devices; for use, not for training.
    """

    def __init__(
        self,
        id: str,
        revision: str | None = None,
        template: str | None = None,
        implementation: str = "sdpa",
        dtype: str = "float32",
        device_map: str | None = None,
    ) -> None:
        super().__init__()
        library = load_library(id, revision, implementation, dtype, device_map)
        self.__dict__["library"] = library  # not registered: its tensors have roles below
        self.id, self.revision, self.template, self.device_map = id, revision, template, device_map
        roles = find_roles(library)
        self.vision = Borrowed(library, roles["vision"])
        self.connector = Borrowed(library, roles["connector"])
        self.language = HostedLanguage(library, roles["language"])
        self._checked = False
        self._stops: list[int] = []  # the processor's own ends, known with it

    def forward(self, batch: Batch, scored: Tensor | None = None) -> Tensor:
        """Hidden states (B,T,D), as the class gives them to its head."""
        with passing(self.language.head) as seen:
            out = self.library(**self.inputs(batch), use_cache=False)
        hidden = seen[-1]
        if not self._checked:
            self._check_finish(hidden[..., :1], out.logits)
        return hidden

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The keyword arguments of the class's own forward; it computes its positions itself."""
        tokens = batch.text["language"]
        extra = batch.images.extra if batch.images is not None else {}
        dtype = self.library.dtype
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in extra.items()}
        return {"input_ids": tokens.ids, "attention_mask": tokens.mask.long(), **cast}

    @torch.inference_mode()
    def generate(self, batch: Batch, **decoding: Any) -> Tensor:
        """(B,new) token ids after left-padded prompts; greedy unless told otherwise."""
        inputs = self.inputs(batch)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        settings = {
            "max_new_tokens": 32,
            **({} if decoding.get("do_sample") else greedy),
            **decoding,
        }
        ids = self.library.generate(**inputs, **{**self._ends(), **settings})
        prompt = inputs["input_ids"]  # (B,T)
        length = prompt.shape[1]
        # classes that generate from embeddings return the new tokens alone
        repeats = ids.shape[1] >= length and torch.equal(ids[:, :length], prompt)
        return ids[:, length:] if repeats else ids

    def processor(self) -> HostedProcessor:
        """What turns samples into batches: the model's own processor and template."""
        processor = HostedProcessor.of(self.id, self.revision, self.template)
        self._stops = processor.stop_ids
        return processor

    def train(self, mode: bool = True) -> HostedVLM:
        self.library.train(mode)  # also the containers that no role holds
        super().train(mode)
        return self

    def _ends(self) -> dict[str, Any]:
        """Padding and the tokens that end an answer: the checkpoint's and the processor's."""
        stated = self.library.generation_config
        listed = (
            stated.eos_token_id if isinstance(stated.eos_token_id, list) else [stated.eos_token_id]
        )
        ends = sorted({i for i in [*listed, *self._stops] if i is not None})
        pad = stated.pad_token_id
        return {
            "eos_token_id": ends or None,
            "pad_token_id": ends[0] if pad is None and ends else pad,
        }

    def _check_finish(self, probe: Tensor, logits: Tensor) -> None:
        """Compare what the class does behind its head with `finish`, once, on one column."""
        ours = self.language.finish(probe).float()
        if logits.shape != probe.shape or not torch.allclose(
            ours, logits.float(), rtol=1e-2, atol=1e-3
        ):
            raise TriptychError(
                f"{type(self.library).__name__} changes the output of its head in a way that "
                "HostedLanguage.finish does not know; extend it or interop.hosted_roles.UNSCALED."
            )
        self._checked = True


@contextmanager
def passing(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let a head keep the hidden states (B,T,D) it is given and return one column of them.

    So any class, wherever it calls its head, gives its hidden states, and (B,T,V) never exists.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    before = head.__dict__.get("forward")  # set on the instance by hooks of accelerate
    head.forward = keep
    try:
        yield seen
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def load_library(
    id: str, revision: str | None, implementation: str, dtype: str, device_map: str | None
) -> PreTrainedModel:
    """The class's own object; what is no decoder for images and text is refused by name."""
    from transformers import AutoModelForImageTextToText

    from triptych.adapt import hardware_dtype

    config = read_config(None, id, "")
    name = type(config).__name__.removesuffix("Config")
    known = AutoModelForImageTextToText._model_mapping
    if type(config) not in known:
        raise TriptychError(
            f"'{id}' is a {name} model, which takes no images and text together; model=hf needs an "
            "image-text-to-text model."
        )
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        raise TriptychError(
            f"'{id}' is a {name} model with a sequence-to-sequence language model; model=hf takes "
            "those with a decoder."
        )
    if dtype == "auto":
        dtype = str(hardware_dtype("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype.removeprefix("torch.")
    return load_model(
        AutoModelForImageTextToText,
        config,
        resolve(id),
        revision,
        implementation,
        dtype,
        device_map,
    )
