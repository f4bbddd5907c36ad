"""Rebuild assets/tiny: `python -m triptych.apps.tiny tokenizer|vision|language|qformer`.

The tokenizer and all models learn from the procedural scenes of `data=shapes` alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from triptych.cli import assets_dir

VOCABULARY = 768
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    """Rebuild one of the assets."""
    builders = {"tokenizer": tokenizer, "vision": vision, "language": language, "qformer": qformer}
    if len(sys.argv) < 2 or sys.argv[1] not in builders:
        raise SystemExit(f"usage: python -m triptych.apps.tiny {'|'.join(builders)} [overrides]")
    builders[sys.argv[1]](sys.argv[2:])


def tokenizer(overrides: list[str]) -> None:
    """A byte-level BPE of 768 tokens with roles and a chat template that marks generation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        min_frequency=2,
    )
    core.train_from_iterator(_texts(), trainer)
    # captions end with the stop token, which CLIP's text tower pools
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <|end|>",
        special_tokens=[(t, core.token_to_id(t)) for t in ("<bos>", "<|end|>")],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<|end|>"
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(assets_dir() / "tiny" / "language")


def vision(overrides: list[str]) -> None:
    """Train and keep the vision tower of `experiment=tiny/vision`."""
    run = _train("tiny/vision", overrides)
    _keep(run, "vision")


def language(overrides: list[str]) -> None:
    """Train and keep the decoder of `experiment=tiny/language`."""
    run = _train("tiny/language", overrides)
    _keep(run, "language")


def qformer(overrides: list[str]) -> None:
    """Train and keep the Q-Former of the small `experiment=blip2/stage1`, text branch and all."""
    from safetensors.torch import save_file

    from triptych.api import load
    from triptych.bundle import unique_tensors

    part = load(_train("blip2/stage1", overrides)).model.connector
    tensors, _ = unique_tensors(dict(part.state_dict(keep_vars=True)))
    folder = assets_dir() / "tiny" / "qformer"
    folder.mkdir(exist_ok=True)
    halves = {name: tensor.detach().half() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors")


def _texts() -> Iterator[str]:
    from triptych.data.shapes import Shapes

    for kind, per_image in (("language", 6), ("captions", 3)):
        reader = Shapes(kind=kind, size=6000, per_image=per_image)
        for i in range(len(reader)):
            yield from (
                part["text"]
                for message in reader[i].messages
                for part in message["content"]
                if part["type"] == "text"
            )


def _train(name: str, overrides: list[str]) -> Path:
    run = Path("runs") / f"tiny-{name.rpartition('/')[2]}"
    script = assets_dir().parent / "train.py"
    command = [sys.executable, str(script), f"experiment={name}", f"hydra.run.dir={run}"]
    subprocess.run([*command, "ckpt=last", *overrides], check=True)
    return run


def _keep(run: Path, role: str) -> None:
    """Write the part in half precision, as the library's own folder layout."""
    import torch

    from triptych.api import load

    part = getattr(load(run).model, role)
    folder = assets_dir() / "tiny" / role
    part.model.to(torch.float16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, used in single
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if role == "vision":
        height, width = part.transform.size
        preprocessor = {
            "do_resize": True,
            "do_center_crop": False,
            "size": {"height": height, "width": width},
            "image_mean": part.transform.mean,
            "image_std": part.transform.std,
            "resample": int(part.transform.resample),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


if __name__ == "__main__":
    main()
