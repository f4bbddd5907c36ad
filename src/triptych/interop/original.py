"""MiniGPT-4 and the first Qwen-VL as their own code names things, which no library class reads.

Real weights were never loaded here: names and shapes follow the published code (MiniGPT-4
`minigpt4/models/{eva_vit,Qformer,minigpt4}.py`, Qwen-VL `modeling_qwen.py` and `visual.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from triptych.interop.official import listed
from triptych.models.vlm import VLM
from triptych.types import TriptychError

Rows = tuple[tuple[str, str], ...]  # (pattern of their name, ours)

BLOCK = r"visual_encoder\.blocks\.(\d+)\."
LAYER = r"Qformer\.bert\.encoder\.layer\.(\d+)\."
MINIGPT4: Rows = (
    (r"visual_encoder\.cls_token", "vision.model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision.model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision.model.embeddings.patch_embedding."),
    (BLOCK + r"norm1\.", r"vision.model.encoder.layers.\1.layer_norm1."),
    (BLOCK + r"norm2\.", r"vision.model.encoder.layers.\1.layer_norm2."),
    (BLOCK + r"attn\.proj\.", r"vision.model.encoder.layers.\1.self_attn.projection."),
    (BLOCK + r"attn\.", r"vision.model.encoder.layers.\1.self_attn."),
    (BLOCK + r"mlp\.", r"vision.model.encoder.layers.\1.mlp."),
    (r"ln_vision\.", "connector.norm."),
    (r"query_tokens", "connector.queries"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "connector.qformer.layernorm."),
    (
        LAYER + r"(cross)?attention\.self\.",
        r"connector.qformer.encoder.layer.\1.\2attention.attention.",
    ),
    (LAYER, r"connector.qformer.encoder.layer.\1."),
    (r"llama_proj\.", "connector.proj."),
)
VISUAL = r"transformer\.visual\."
RES = VISUAL + r"transformer\.resblocks\.(\d+)\."
HIDDEN = r"transformer\.h\.(\d+)\."
QWEN_VL: Rows = (
    (VISUAL + r"positional_embedding", "vision.model.embeddings.position_embedding.weight"),
    (VISUAL + r"conv1\.", "vision.model.embeddings.patch_embedding."),
    (VISUAL + r"ln_pre\.", "vision.model.pre_layrnorm."),
    (RES + r"ln_(\d)\.", r"vision.model.encoder.layers.\1.layer_norm\2."),
    (RES + r"attn\.", r"vision.model.encoder.layers.\1.self_attn."),
    (RES + r"mlp\.c_fc\.", r"vision.model.encoder.layers.\1.mlp.fc1."),
    (RES + r"mlp\.c_proj\.", r"vision.model.encoder.layers.\1.mlp.fc2."),
    (VISUAL + r"attn_pool\.query", "connector.queries"),
    (VISUAL + r"attn_pool\.", "connector."),
    (VISUAL + r"(ln_post\.|proj)", r"connector.\1"),
    (r"transformer\.wte\.", "language.model.model.embed_tokens."),
    (HIDDEN + r"ln_1\.", r"language.model.model.layers.\1.input_layernorm."),
    (HIDDEN + r"ln_2\.", r"language.model.model.layers.\1.post_attention_layernorm."),
    (HIDDEN + r"attn\.c_proj\.", r"language.model.model.layers.\1.self_attn.o_proj."),
    (HIDDEN + r"attn\.", r"language.model.model.layers.\1.self_attn."),
    (HIDDEN + r"mlp\.w1\.", r"language.model.model.layers.\1.mlp.up_proj."),
    (HIDDEN + r"mlp\.w2\.", r"language.model.model.layers.\1.mlp.gate_proj."),
    (HIDDEN + r"mlp\.c_proj\.", r"language.model.model.layers.\1.mlp.down_proj."),
    (r"transformer\.ln_f\.", "language.model.model.norm."),
    (r"lm_head\.", "language.model.lm_head."),
)
DROPPED = re.compile(r"(Qformer\.bert\.embeddings\.position_ids|.*attn_pool\.pos_embed)$")


def load_minigpt4(model: VLM, state: Mapping[str, Tensor]) -> None:
    """Fill tower, Q-Former and projection; the language model has weights of its own.

    state: the tensors of eva_vit_g.pth under `visual_encoder.`, of BLIP-2's Q-Former file and of
    MiniGPT-4's file, as its model names them.
    """
    tensors = renamed(state, MINIGPT4)
    for name in [n for n in tensors if n.endswith(".q_bias")]:  # the key has no bias
        query, value = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"))
        bias = torch.cat([query, torch.zeros_like(query), value])
        tensors[name.replace("q_bias", "qkv.bias")] = bias
    for leaf in ("weight", "bias"):  # the tower's own copy of ln_vision is never run
        name = f"connector.norm.{leaf}"
        tensors |= {f"vision.model.post_layernorm.{leaf}": tensors[name]} if name in tensors else {}
    _load(model, tensors, ("language.",), "the MiniGPT-4 checkpoint")


def load_qwen_vl(model: VLM, state: Mapping[str, Tensor]) -> None:
    """Fill all parts of a Qwen-VL, whose projections of query, key and value are stored fused."""
    heads = model.vision.config.num_attention_heads
    tensors: dict[str, Tensor] = {}
    for name, tensor in renamed(state, QWEN_VL).items():
        if ".self_attn.in_proj." in name:
            _spread(tensors, name, "in_proj", per_head(tensor, heads))
        elif ".self_attn.c_attn." in name:
            _spread(tensors, name, "c_attn", tensor.chunk(3))
        else:
            tensors[name] = tensor
    _load(model, tensors, (), "the Qwen-VL checkpoint")


def per_head(fused: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Query, key and value rows of a projection that stores them head by head."""
    parts = fused.unflatten(0, (heads, 3, -1))  # (heads, 3, rows of a head, ...)
    return tuple(parts[:, i].flatten(0, 1) for i in range(3))


def renamed(state: Mapping[str, Tensor], rows: Rows) -> dict[str, Tensor]:
    """Tensors under our names. Raises TriptychError that lists names without a row."""
    found, left = {}, []
    for name, tensor in state.items():
        if DROPPED.match(name):
            continue
        row = next(((p, ours) for p, ours in rows if re.match(p, name)), None)
        if row is None:
            left.append(name)
        else:
            found[re.sub(*row, name, count=1)] = tensor
    if left:
        raise TriptychError(
            f"the checkpoint holds {listed(left)}, for which this family has no place; is it "
            "another family?"
        )
    return found


def _spread(tensors: dict[str, Tensor], name: str, fused: str, parts: tuple[Tensor, ...]) -> None:
    for one, tensor in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        tensors[name.replace(fused, one)] = tensor


def _load(model: VLM, tensors: Mapping[str, Tensor], apart: tuple[str, ...], what: str) -> None:
    own = model.state_dict()
    needed = {n for n in own if not (apart and n.startswith(apart))}
    lacking, left = sorted(needed - tensors.keys()), sorted(tensors.keys() - needed)
    odd = [n for n in needed & tensors.keys() if own[n].shape != tensors[n].shape]
    for verb, names in (("lacks", lacking), ("also holds", left), ("has other shapes of", odd)):
        if names:
            raise TriptychError(f"{what} {verb} {listed(names)}; check the size of the preset.")
    model.load_state_dict(dict(tensors), strict=False, assign=True)
