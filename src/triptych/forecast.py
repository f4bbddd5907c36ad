"""What a run will hold in memory, computed without weights: before every run, or alone.

`python train.py model=llava/7b dry_run=true` builds the preset on "meta" (no network, no memory)
and runs one step of shapes through it; `dry_run.gpu_gb=24` also says whether it fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from triptych.adapt import Quantization, head_names
from triptych.build import Adapted, build, build_model, build_objective, build_optim, parts_asked
from triptych.data.datamodule import DataModule
from triptych.memory import Kernels, Live
from triptych.models.base import Model
from triptych.models.fusion import IMAGE
from triptych.objectives.base import Objective
from triptych.types import IGNORE, PAD, SHARED, Batch, ImageFeatures, Images, Tokens

if TYPE_CHECKING:
    import pytorch_lightning as pl

GIB = 2**30
ROWS = 512  # rows of the data among which the largest batch is looked for


@dataclass
class Part:
    """One part of the model; bytes."""

    name: str
    parameters: int
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


@dataclass
class Forecast:
    """Bytes of one process; `peak` is the most that exists at once in a training step."""

    parts: list[Part]
    batch: str  # the largest batch, in words
    image_tokens: int | None
    activations: int = 0  # kept for the backward pass
    peak: int = 0
    problem: str = ""  # why activations and peak could not be computed

    @property
    def total(self) -> Part:
        sums = (sum(getattr(p, f) for p in self.parts) for f in list(vars(self.parts[0]))[1:])
        return Part("total", *sums)

    def fits(self, gpu_gb: float) -> bool:
        return not self.problem and self.peak <= gpu_gb * GIB

    def text(self, gpu_gb: float | None = None) -> str:
        """The table a run prints."""
        head = ("memory", "parameters", "weights", "gradients", "optimizer")
        lines = [
            f"{p.name:12}{p.parameters / 1e6:>13,.2f} M{_gib(p.weights)}"
            f"{_gib(p.gradients)}{_gib(p.optimizer)}"
            for p in [*self.parts, self.total]
        ]
        lines.insert(0, f"{head[0]:12}{head[1]:>15}" + "".join(f"{h:>15}" for h in head[2:]))
        if self.image_tokens:
            lines.append(f"image tokens {self.image_tokens}; largest batch: {self.batch}")
        else:
            lines.append(f"largest batch: {self.batch}")
        if self.problem:
            lines.append(f"activations could not be computed: {self.problem}")
        else:
            lines.append(
                f"activations {_gib(self.activations).strip()}, peak {_gib(self.peak).strip()} "
                "(tensors of training; not the libraries, nor blocks the allocator keeps)"
            )
        if gpu_gb is not None and not self.problem:
            verdict = "fits" if self.fits(gpu_gb) else "does NOT fit"
            lines.append(f"{verdict} in dry_run.gpu_gb={gpu_gb:g}")
        return "\n".join(lines)


def dry_run(cfg: DictConfig, overrides: Sequence[str]) -> Forecast:
    """The forecast of a configuration alone: its fullest batch, nothing loaded or downloaded."""
    adapted = build_model(cfg, asked=parts_asked(overrides), meta=True)
    batch = fullest(adapted.model, cfg.data.batch_size, cfg.data.max_length)
    precision = cfg.trainer.precision
    gpu = cfg.dry_run.gpu_gb is not None or torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16-mixed" if gpu and cfg.trainer.accelerator != "cpu" else "32-true"
    return forecast(cfg, adapted, batch, precision)


def before_run(cfg: DictConfig, data: DataModule, trainer: pl.Trainer) -> str:
    """The forecast of a run with its data, as text: the longest rows stand for its largest batch.

    A batch that would not fit is split here into micro-batches that make the same step.

    Called when the feature cache is filled, whose features then stand for the pixels. The peak is
    of tensors; on Linux the process keeps freed blocks beside them (`hardware.keep_memory`), so its
    resident memory may be twice as large; where that might not fit, blocks are handed back. Never
    stops a run, and leaves its random state alone.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            from triptych.micro_batch import spare_memory, split_to_fit

            found, split = split_to_fit(cfg, build_model(cfg, meta=True), trainer, data)
            on_cpu = trainer.strategy.root_device.type == "cpu"
            spared = spare_memory(found, cfg.memory.limit_gb) if on_cpu else ""
            return "\n".join(filter(None, (found.text(), split, spared)))
        except Exception as error:  # a part that cannot be built on "meta" still trains
            return f"memory forecast: not possible ({' '.join(str(error).split())[:200]})"


def forecast(
    cfg: DictConfig,
    adapted: Adapted,
    batch: Batch,
    precision: str,
    accumulate: int | None = None,
) -> Forecast:
    """Run one step of an adapted model, built on "meta", and count.

    Over a quantized base it is the unquantized model that runs, and the stored sizes are counted;
    one layer is dequantized at a time.
    """
    model, low = adapted.model, _low(precision)
    objective = build_objective(cfg, cfg.trainer.accumulate_grad_batches)
    sizes = {role: [p.numel() for p in getattr(model, role).parameters()] for role in model.roles}
    parts = [Part(role, sum(size)) for role, size in sizes.items()]
    quantization: Quantization = build(cfg.quantization)
    stored = _stored(model, quantization, quantization.targets(model, adapted.table))
    for part in parts:
        tensors = dict(getattr(model, part.name).named_parameters(prefix=part.name))
        part.weights = sum(stored.get(n, t.nbytes) for n, t in tensors.items())
        part.gradients = sum(t.nbytes for t in tensors.values() if t.requires_grad)
    tokens = _image_tokens(model)
    result = Forecast(parts, _words(batch), tokens)
    optimizer = build_optim(cfg).build(model)
    accumulate = (accumulate or cfg.trainer.accumulate_grad_batches) > 1
    try:
        result.activations, peak = step(model, objective, batch, low, accumulate)
        held, stepping = optimizer_bytes(model, optimizer)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        result.problem = " ".join(str(error).split())[:200]
        return result
    for part in parts:
        part.optimizer = sum(b for n, b in held.items() if n.split(".")[0] == part.name)
    state = sum(held.values())
    dequantized = max((_plain(model, n, low) for n in stored), default=0)
    weights = sum(p.weights for p in parts)
    result.peak = weights + max(peak + state + dequantized, stepping)
    return result


def step(
    model: Model, objective: Objective, batch: Batch, low: torch.dtype | None, accumulate: bool
) -> tuple[int, int]:
    """(activations, peak): bytes after the forward pass, and the most until gradients are there."""
    live = Live()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.ignore(tensor)
    model.train()
    with live, Kernels(low):
        batch = on_meta(batch)
        if accumulate:  # gradients of the micro-batches before
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        before = live.bytes
        terms = objective(model, batch)
        loss = sum(t.weight * t.sum for t in terms.values())
        activations = live.bytes - before
        torch.autograd.backward(loss)  # Tensor.backward would switch `Kernels` off
    return activations, live.peak


def optimizer_bytes(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, int], int]:
    """State by tensor name, and the most that exists in a step: gradients, state, temporaries."""
    live = Live()
    for parameter in model.parameters():
        live.ignore(parameter)
    trained = {p: n for n, p in model.named_parameters() if p.requires_grad}
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        live.ignore(parameter.grad)
    with live:
        optimizer.step()
    gradients = sum(p.grad.nbytes for p in trained)
    held = {
        trained[p]: sum(t.nbytes for t in state.values() if isinstance(t, Tensor))
        for p, state in optimizer.state.items()
    }
    for parameter in trained:
        parameter.grad = None
    return held, live.peak + gradients


def fullest(model: Model, rows: int, tokens: int) -> Batch:
    """A batch of shapes: each row one image and `tokens` tokens, half of them supervised."""
    text, slots, images = {}, None, None
    if hasattr(model, "vision"):
        size = model.vision.transform.size
        pixels = torch.empty(rows, 3, *size, dtype=torch.uint8, device="meta")
        images = Images([str(i) for i in range(rows)], pixels)
        slots = torch.tensor([[i, i, SHARED] for i in range(rows)])
    if hasattr(model, "language"):
        q = _image_tokens(model) or 0
        ids = torch.zeros(rows, max(tokens, q + 2), dtype=torch.long)
        ids[:, :q] = IMAGE
        segments = torch.ones_like(ids)
        segments[:, :q] = SHARED
        labels = ids.clone()
        labels[:, : (q + ids.shape[1]) // 2] = IGNORE
        text["language"] = Tokens(ids, _count_up(ids), segments, labels)
    if hasattr(model, "text"):
        ids = torch.zeros(rows, min(tokens, model.text.max_length), dtype=torch.long)
        text["text"] = Tokens(ids, _count_up(ids), torch.ones_like(ids))
        if slots is not None:
            slots[:, 2] = 1
    elif getattr(getattr(model, "connector", None), "reads_text", False):
        ids = torch.zeros(rows, 64, dtype=torch.long)  # an instruction
        text["text"] = Tokens(ids, _count_up(ids), torch.ones_like(ids))
    return Batch(images, slots, text, [])


def largest(data: DataModule) -> Batch:
    """The batch of the rows with the most words, among the first of an epoch."""
    samples = data.first_rows(ROWS)
    samples.sort(key=lambda row: sum(len(s.text) for s in row), reverse=True)
    return data.processor.rows(samples[: data.batch_size])


def on_meta(batch: Batch) -> Batch:
    """The batch with pixels and features as shapes; integers stay as they are."""

    def shape(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.empty_like(tensor, device="meta")

    images = batch.images
    if images is not None:
        features = images.features
        if features is not None:
            features = ImageFeatures(
                shape(features.tokens), features.counts, shape(features.pooled)
            )
        extra = {k: shape(v) if v.is_floating_point() else v for k, v in images.extra.items()}
        images = Images(images.keys, shape(images.pixels), features, extra)
    return Batch(images, batch.slots, batch.text, batch.samples, batch.totals)


def _stored(model: Model, how: Quantization, roles: list[str]) -> dict[str, int]:
    """Bytes of every weight that will be quantized, with its scales."""
    found = {}
    for role in roles:
        part = getattr(model, role)
        skip = head_names(part)
        for name, module in part.named_modules():
            if not isinstance(module, nn.Linear) or name in skip or ".lora_" in name:
                continue
            n, rows = module.weight.numel(), module.out_features
            blocks = -(-n // 64)  # bitsandbytes: a scale for 64 weights, theirs again by 256
            scales = blocks + 4 * -(-blocks // 256) if how.double else 4 * blocks
            size = n + 4 * rows if how.method == "int8" else -(-n // 2) + scales
            found[f"{role}.{name}.weight"] = size
    return found


def _plain(model: Model, name: str, low: torch.dtype | None) -> int:
    return model.get_parameter(name).numel() * (low or torch.float32).itemsize


def _image_tokens(model: Model) -> int | None:
    size = model.vision.transform.size if hasattr(model, "vision") else None
    return model.placeholders(*size) if size and hasattr(model, "placeholders") else None


def _low(precision: str) -> torch.dtype | None:
    known = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return known.get(str(precision))


def _words(batch: Batch) -> str:
    words = [f"{len(batch.images)} images"] if batch.images is not None else []
    for role, tokens in batch.text.items():
        shape = " x ".join(map(str, tokens.ids.shape))
        words.append(f"{role} {shape} tokens ({int((tokens.segments != PAD).sum()):,} not padding)")
    return ", ".join(words)


def _count_up(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


def _gib(size: int) -> str:
    if not size:
        return f"{'-':>15}"
    return f"{size / GIB:>11,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:>11,.2f} MiB"


__all__ = ["Forecast", "before_run", "dry_run", "forecast"]
