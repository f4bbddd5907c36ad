"""Added memory of a contrastive step: one plain batch against a large batch in chunks.

python benchmarks/chunk_memory.py          steps of the bare model, each in a fresh process
python benchmarks/chunk_memory.py run      the same inside training runs: data, trainer, audit, logs

Model: ViT of 6 x 256 at 64 px with patches of 8, text transformer of 4 x 256 with 77 places and
49,408 words. Added memory is the peak RSS above what is resident after imports, model, gradients,
optimizer state and batch. Freed blocks go back to the kernel (`hardware.return_memory`): with
glibc's defaults the fragments of 16 chunks stay resident, and the large batch adds 3.4 times as
much as the plain one. In a run, the plain batch keeps glibc's memory as every run without chunks.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

PLAIN, LARGE = (64, 0), (1024, 64)  # batch, objective.chunk
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 64,
    "patch_size": 8,
    "num_hidden_layers": 6,
    **SIZES,
}
TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "num_hidden_layers": 4,
    "max_position_embeddings": 77,
    **SIZES,
}


def step_mib(rows: int, chunk: int) -> float:
    """MiB that one step of the bare model adds, measured in this process."""
    import torch

    from triptych.callbacks import peak_rss
    from triptych.data.transforms import ImageTransform
    from triptych.hardware import return_memory
    from triptych.models.dual import DualEncoder, Heads
    from triptych.objectives.contrastive import InfoNCE
    from triptych.parts.text import TextEncoder
    from triptych.parts.vision import VisionEncoder
    from triptych.types import Batch, Images, Sample, Tokens

    return_memory()
    model = DualEncoder(
        VisionEncoder(config=VISION, transform=ImageTransform(size=(64, 64))),
        TextEncoder(config=TEXT),
        partial(Heads, dim=256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def batch(size: int) -> Batch:
        ids = torch.randint(1, 49000, (size, 77))
        ids[:, -1] = 49407
        pixels = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8)
        slots = torch.tensor([[i, i, 1] for i in range(size)])
        tokens = Tokens(ids, torch.arange(77).expand_as(ids), torch.ones_like(ids))
        images = Images([str(i) for i in range(size)], pixels)
        return Batch(images, slots, {"text": tokens}, [Sample([], id=str(i)) for i in range(size)])

    def step(data: Batch, chunk: int) -> None:
        InfoNCE(chunk=chunk)(model, data)["contrastive"].sum.div(len(data.samples)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step(batch(2), 0)  # gradients and optimizer state exist from here on
    data = batch(rows)
    before = peak_rss()
    step(data, chunk)
    return (peak_rss() - before) * 1024


def run_mib(rows: int, chunk: int) -> float:
    """MiB that the steps of a training run add, measured by a callback of that run."""
    from omegaconf import OmegaConf

    from triptych import run as training
    from triptych.bundle import compose_preset
    from triptych.callbacks import Throughput, peak_rss

    measured: dict[str, float] = {}

    class Measured(Throughput):
        """What is resident before the first step, and the peak of the steps."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            measured.setdefault("before", _resident())
            weights = sum(p.nbytes for p in module.parameters() if p.requires_grad)
            measured["state"] = 3 * weights / 2**20  # gradients, and Adam's two moments
            super().on_train_batch_start(trainer, module, batch, index)

        def on_train_batch_end(self, *args: Any) -> None:
            measured["peak"] = peak_rss() * 1024
            super().on_train_batch_end(*args)

    training.Throughput = Measured
    steps = 2  # the second has an optimizer state
    options = [f"objective.chunk={chunk}", f"data.batch_size={rows}", f"trainer.max_steps={steps}"]
    options += [f"data.train.size={steps * rows}", "benchmark=none", "optim=adamw"]
    cfg = compose_preset("clip/b32", ["data=shapes_captions", *options])
    OmegaConf.set_struct(cfg, False)
    cfg.model.weights = None
    cfg.model.heads.dim = 256
    cfg.model.vision.config, cfg.model.text.config = VISION, TEXT
    cfg.model.vision.transform.size = [64, 64]
    cfg.model.text.update(tokenizer="assets/tiny/language", pooling="last", padding="max_length")
    with tempfile.TemporaryDirectory() as folder:
        training.train(cfg, Path(folder))
    return measured["peak"] - measured["before"] - measured["state"]


def _resident() -> float:
    """MiB of this process in memory now."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    """Measure both batches in fresh processes and print the ratio, or one of them here."""
    kind = sys.argv[1] if len(sys.argv) > 1 else "step"
    measure = {"step": step_mib, "run": run_mib}[kind]
    if len(sys.argv) == 4:
        print(measure(int(sys.argv[2]), int(sys.argv[3])))
        return
    measured = []
    for rows, chunk in (PLAIN, LARGE):
        command = [sys.executable, __file__, kind, str(rows), str(chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured.append(float(done.stdout.split()[-1]))
        print(f"batch {rows:5d}  chunk {chunk:3d}  added {measured[-1]:7.0f} MiB", flush=True)
    print(f"ratio {measured[1] / measured[0]:.2f} (at most 1.30)")


if __name__ == "__main__":
    main()
