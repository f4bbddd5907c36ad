"""Contrastive training: this project's step against open_clip's, from the same weights.

python benchmarks/contrastive.py                      batch 256, captions of 8 to 12 tokens
python benchmarks/contrastive.py --captions full      captions that fill the context of 77
python benchmarks/contrastive.py --quick

Model: ViT of 6 x 256 at 64 px with patches of 8, text transformer of 4 x 256, 49,408 words.
AdamW included, inputs preloaded. `ours_chunk64` is the same batch in chunks; what a chunked batch
of 1,024 adds in memory is benchmarks/chunk_memory.py.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import side_by_side
from side_by_side import Memory, Result, finished

WIDTH, CONTEXT, WORDS, END = 256, 77, 49408, 49407
VARIANTS = (
    "open_clip",
    "open_clip_accum_chunk64",
    "ours",
    "ours_chunk64",
    "ours_without_trim",
    "ours_without_one_token",
    "ours_with_length_groups",
    "ours_without_kept_memory",
)
BLOCK = 12 * WIDTH**2  # weights of a block


def peer():
    import open_clip
    import torch

    torch.manual_seed(0)
    return open_clip.model.CLIP(
        embed_dim=WIDTH,
        vision_cfg={
            "layers": 6,
            "width": WIDTH,
            "head_width": 64,
            "patch_size": 8,
            "image_size": 64,
        },
        text_cfg={
            "context_length": CONTEXT,
            "vocab_size": WORDS,
            "width": WIDTH,
            "heads": 4,
            "layers": 4,
        },
        output_dict=True,
    )


def own(source):
    """This project's towers with the weights of `source`."""
    from functools import partial

    from triptych.data.transforms import ImageTransform
    from triptych.models.dual import DualEncoder, Heads
    from triptych.parts.text import TextEncoder
    from triptych.parts.vision import VisionEncoder

    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    sizes["hidden_act"] = "gelu"
    vision = {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, **sizes}
    text = {"model_type": "clip_text_model", "vocab_size": WORDS, "eos_token_id": END, **sizes}
    model = DualEncoder(
        VisionEncoder(
            config={**vision, "num_hidden_layers": 6}, transform=ImageTransform(size=(64, 64))
        ),
        TextEncoder(config={**text, "num_hidden_layers": 4, "max_position_embeddings": CONTEXT}),
        partial(Heads, dim=WIDTH),
    )
    state, theirs = model.state_dict(), source.state_dict()
    for name, value in translated(theirs).items():
        state[name].copy_(value)
    return model


def translated(theirs: dict) -> dict:
    """open_clip's tensors under this project's names; its fused projections are split."""
    found = {"heads.logit_scale": theirs["logit_scale"]}
    found["heads.image.weight"] = theirs["visual.proj"].T
    found["heads.text.weight"] = theirs["text_projection"].T
    pairs = {
        "visual.conv1.weight": "vision.model.embeddings.patch_embedding.weight",
        "visual.class_embedding": "vision.model.embeddings.class_embedding",
        "visual.positional_embedding": "vision.model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text.model.embeddings.token_embedding.weight",
        "positional_embedding": "text.model.embeddings.position_embedding.weight",
    }
    for kind in ("weight", "bias"):
        pairs[f"visual.ln_pre.{kind}"] = f"vision.model.pre_layrnorm.{kind}"
        pairs[f"visual.ln_post.{kind}"] = f"vision.model.post_layernorm.{kind}"
        pairs[f"ln_final.{kind}"] = f"text.model.final_layer_norm.{kind}"
    towers = (("visual.transformer", "vision", 6), ("transformer", "text", 4))
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for a, b, depth in towers:
        for i in range(depth):
            block, mine = f"{a}.resblocks.{i}", f"{b}.model.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for x, y in inner.items():
                    pairs[f"{block}.{x}.{kind}"] = f"{mine}.{y}.{kind}"
                fused = theirs[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for part, value in zip("qkv", fused, strict=True):
                    found[f"{mine}.self_attn.{part}_proj.{kind}"] = value
    return found | {mine: theirs[name] for name, mine in pairs.items()}


def inputs(args, step: int):
    """(pixels uint8, ids (B,77), lengths)."""
    import torch

    made = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (args.batch, 3, 64, 64), dtype=torch.uint8, generator=made)
    ids = torch.randint(1, WORDS - 2, (args.batch, CONTEXT), generator=made)
    low, high = (8, 13) if args.captions == "short" else (CONTEXT, CONTEXT + 1)
    lengths = torch.randint(low, high, (args.batch,), generator=made)
    ids[torch.arange(args.batch), lengths - 1] = END
    return pixels, ids * (torch.arange(CONTEXT) < lengths[:, None]), lengths


def batch(args, step: int, trim: bool = True):
    import torch

    from triptych.types import Batch, Images, Sample, Tokens

    pixels, ids, lengths = inputs(args, step)
    mask = torch.arange(CONTEXT) < lengths[:, None]
    if trim:
        ids, mask = ids[:, : int(lengths.max())], mask[:, : int(lengths.max())]
    tokens = Tokens(ids, torch.arange(ids.shape[1]).expand_as(ids), mask.long())
    slots = torch.tensor([[i, i, 1] for i in range(args.batch)])
    images = Images([str(i) for i in range(args.batch)], pixels)
    return Batch(
        images, slots, {"text": tokens}, [Sample([], id=str(i)) for i in range(args.batch)]
    )


def normalized(pixels):
    from triptych.data.transforms import ImageTransform

    return ImageTransform(size=(64, 64)).normalize(pixels)


def peer_step(model, args, step: int, chunk: int = 0):
    """Loss and gradients as open_clip's training computes them; `chunk`: its --accum-freq."""
    import torch
    from open_clip.loss import ClipLoss

    pixels, ids, _ = inputs(args, step)
    loss_of, images = ClipLoss(), normalized(pixels)
    if not chunk:
        out = model(images, ids)
        loss = loss_of(out["image_features"], out["text_features"], out["logit_scale"])
        loss.backward()
        return loss
    pieces = list(zip(images.split(chunk), ids.split(chunk), strict=True))
    with torch.no_grad():
        kept = [model(*piece) for piece in pieces]
    for number, piece in enumerate(pieces):
        out = model(*piece)
        features = {
            name: torch.cat(
                [
                    *(k[name] for k in kept[:number]),
                    out[name],
                    *(k[name] for k in kept[number + 1 :]),
                ]
            )
            for name in ("image_features", "text_features")
        }
        loss = loss_of(**features, logit_scale=out["logit_scale"])
        loss.backward()
    return loss


def own_step(model, args, step: int, chunk: int = 0, trim: bool = True):
    from triptych.objectives.contrastive import InfoNCE

    data = batch(args, step, trim)
    loss = InfoNCE(chunk=chunk)(model, data)["contrastive"].sum / args.batch
    loss.backward()
    return loss


def check(args) -> Result:
    """Loss and all gradients, plain and in chunks; and open_clip's scale under accumulation."""
    theirs = peer()
    mine = own(theirs)
    expected = peer_step(theirs, args, 0)
    reference = translated({n: p.grad for n, p in theirs.named_parameters()})
    report: Result = {"loss": expected.item()}
    for chunk in (0, args.batch // 4):
        mine.zero_grad()
        loss = own_step(mine, args, 0, chunk)
        worst = 0.0
        for name, parameter in mine.named_parameters():
            if parameter.grad is not None and name in reference:
                other = reference[name]
                gap = (parameter.grad - other).norm() / other.norm().clamp_min(1e-4)
                worst = max(worst, float(gap))
        key = "chunked" if chunk else "plain"
        report[f"{key} loss difference"] = abs(loss.item() - expected.item())
        report[f"{key} gradient difference"] = worst
        report[f"{key} scale gradient"] = float(mine.heads.logit_scale.grad)
        if report[f"{key} loss difference"] > 1e-5 or worst > 1e-3:
            raise SystemExit(f"{key}: the two differ: {report}")
    theirs.zero_grad()
    peer_step(theirs, args, 0, args.batch // 4)
    report["open_clip scale gradient, 4 chunks"] = float(theirs.logit_scale.grad)
    return report


def measure(variant: str, args) -> Result:
    import torch

    from triptych.hardware import keep_memory
    from triptych.models import dual

    source = peer()
    theirs = variant.startswith("open_clip")
    chunk = 64 if variant.endswith("chunk64") else 0
    if not theirs and variant != "ours_without_kept_memory":
        keep_memory()
    model = source if theirs else own(source)
    if variant == "ours_without_one_token":
        model.text._one_token = model.vision.pooled_only = False
    if variant == "ours_with_length_groups":
        dual.TRAFFIC = 0
    trim = variant != "ours_without_trim"
    if not trim:
        dual.TRAFFIC = float("inf")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    seconds = 0.0
    with Memory() as memory:
        for step in range(args.warm + args.steps):
            start = time.perf_counter()
            if theirs:
                peer_step(model, args, step, chunk)
            else:
                own_step(model, args, step, chunk, trim)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start if step >= args.warm else 0.0
    samples = args.steps * args.batch
    words = sum(int(inputs(args, s)[2].sum()) for s in range(args.warm, args.warm + args.steps))
    width = CONTEXT if theirs or not trim else words / samples
    last = theirs or variant == "ours_without_one_token"
    blocks = 65 * BLOCK * (6 if last else 5.2) + width * BLOCK * (4 if last else 3.2)
    flops = samples * (6 * blocks + 6 * 65 * 192 * WIDTH)
    flops *= 4 / 3 if chunk else 1
    return finished(
        samples,
        seconds,
        tokens=words,
        added_mib=memory.added_mib,
        flops=flops,
        more={"padding": 1 - words / samples / CONTEXT},
    )


def main() -> None:
    parse = side_by_side.parser(__doc__)
    parse.add_argument("--captions", choices=("short", "full"), default="short")
    parse.add_argument("--batch", type=int, default=None)
    parse.add_argument("--steps", type=int, default=None)
    parse.add_argument("--warm", type=int, default=2)  # memory settles in two steps
    args = parse.parse_args()
    args.batch = args.batch or (64 if args.quick else 256)
    args.steps = args.steps or (1 if args.quick else 3)
    name = "contrastive" if args.captions == "short" else "contrastive_full"
    side_by_side.main(name, args, VARIANTS, check, measure, "open_clip")


if __name__ == "__main__":
    main()
