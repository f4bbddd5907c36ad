"""Added memory of a contrastive step: one plain batch against a large batch in chunks.

python benchmarks/chunk_memory.py           runs both, each in a fresh process, and prints the ratio

Model: ViT of 6 x 256 at 64 px with patches of 8, text transformer of 4 x 256 with 77 places and
49,408 words. Added memory is the peak RSS above the one after imports, model, optimizer state and
batch. Freed blocks go back to the kernel (`hardware.return_memory`): with glibc's defaults the
fragments of 16 chunks stay resident, and the large batch adds 3.4 times as much as the plain one.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

PLAIN, LARGE = (64, 0), (1024, 64)  # batch, objective.chunk


def added_mib(rows: int, chunk: int) -> float:
    """MiB that one step adds, measured in this process."""
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
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    vision = {"model_type": "clip_vision_model", "image_size": 64, "patch_size": 8, **sizes}
    text = {"model_type": "clip_text_model", "vocab_size": 49408, "eos_token_id": 49407, **sizes}
    transform = ImageTransform(size=(64, 64))
    model = DualEncoder(
        VisionEncoder(config={**vision, "num_hidden_layers": 6}, transform=transform),
        TextEncoder(config={**text, "num_hidden_layers": 4, "max_position_embeddings": 77}),
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


def main() -> None:
    if len(sys.argv) == 3:
        print(added_mib(int(sys.argv[1]), int(sys.argv[2])))
        return
    measured = []
    for rows, chunk in (PLAIN, LARGE):
        command = [sys.executable, __file__, str(rows), str(chunk)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured.append(float(done.stdout.split()[-1]))
        print(f"batch {rows:5d}  chunk {chunk:3d}  added {measured[-1]:7.0f} MiB", flush=True)
    print(f"ratio {measured[1] / measured[0]:.2f} (at most 1.30)")


if __name__ == "__main__":
    main()
