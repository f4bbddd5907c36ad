"""Instruction tuning with LoRA: this project against the library's Trainer and TRL's SFTTrainer.

python benchmarks/instruct.py                           easy-VQA, ten questions an image
python benchmarks/instruct.py --data varied --each 1    5 to 300 tokens, one question an image
python benchmarks/instruct.py --data varied --each 8    the same with eight
python benchmarks/instruct.py --ablate                  each optimisation off against on
python benchmarks/instruct.py --quick                   a smoke run

Peers: transformers' Trainer with TRL's collator (the fairest on a CPU), TRL's SFTTrainer in float32
without checkpointing, and the naive loop (the library's processor, pad to the longest, the class's
own forward with labels). All train the same weights on the same batches of whole images.
On a GPU, TRL's fused head already skips unsupervised positions; on a CPU it scores every one, so a
ratio to SFTTrainer measured here says nothing about GPUs.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import model_a
import side_by_side
from side_by_side import Memory, Result, finished

PEERS = ("trainer+trl_collator", "trl_sft", "naive")
ABLATIONS = (
    "without_shared_rows",
    "without_feature_cache",
    "without_flat_rows",
    "without_last_block",
    "without_thin_lora",
    "without_supervised_head",
    "without_token_cache",
    "without_kept_memory",
)
LR = 1e-4


def groups(args) -> list[list]:
    if args.data == "easy":
        return model_a.easy_groups(args.steps * args.images)
    return model_a.varied_groups(args.steps * args.images * args.each, args.each)


def batch_size(args) -> int:
    """Samples of an optimizer step, on both sides."""
    return args.images * (10 if args.data == "easy" else args.each)


# ---------------------------------------------------------------- the peers


def collator(args):
    from transformers import AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = AutoProcessor.from_pretrained(model_a.folder())
    return processor, DataCollatorForVisionLanguageModeling(
        processor, max_length=None, completion_only_loss=True
    )


def opened(rows: list[dict]) -> list[dict]:
    return [{**row, "images": [ref.open() for ref in row["images"]]} for row in rows]


class Lazy:
    """The rows with their pictures opened when asked for, as a data set on disk does."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return opened([self.rows[index]])[0]


def settings(args, kind: type, folder: str, **more):
    return kind(
        output_dir=folder,
        per_device_train_batch_size=batch_size(args),
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        num_train_epochs=1,
        max_steps=args.warm + args.steps,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        **more,
    )


def peer(variant: str, args) -> Result:
    import tempfile

    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = model_a.records(groups(args))
    rows = rows[: batch_size(args)] * args.warm + rows  # the first steps are not timed
    processor, collate = collator(args)
    model = model_a.library()
    clock = Clock(args.warm)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end()

    class InOrder:
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    folder = tempfile.mkdtemp()
    common = {"model": model, "callbacks": [Watch()]}
    if variant == "trl_sft":
        from datasets import Dataset, Image, List
        from trl import SFTConfig, SFTTrainer

        files = [{**r, "images": [path(r["images"][0])]} for r in rows]
        data = Dataset.from_list(files).cast_column("images", List(Image()))
        made = type("Peer", (InOrder, SFTTrainer), {})(
            args=settings(args, SFTConfig, folder, max_length=None, completion_only_loss=True),
            train_dataset=data,
            processing_class=processor,
            **common,
        )
    else:
        made = type("Peer", (InOrder, Trainer), {})(
            args=settings(args, TrainingArguments, folder),
            train_dataset=Lazy(rows),
            data_collator=collate,
            **common,
        )
    clock.memory.__enter__()
    made.train()
    clock.memory.__exit__()
    losses = [x["loss"] for x in made.state.log_history if "loss" in x][args.warm :]
    return clock.result(args, losses, work(variant, args))


def path(ref) -> str:
    """The file of an easy-VQA picture."""
    return str(ref.load.args[0])


def naive(variant: str, args) -> Result:
    import torch

    rows, size = model_a.records(groups(args)), batch_size(args)
    processor, collate = collator(args)
    model = model_a.library()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    clock, losses = Clock(args.warm), []
    batches = [rows[:size]] * args.warm + [rows[i : i + size] for i in range(0, len(rows), size)]
    with clock.memory:
        for batch in batches:
            clock.begin()
            loss = model(**collate(opened(batch)), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            clock.end()
    return clock.result(args, losses[args.warm :], work(variant, args))


# ---------------------------------------------------------------- this project


def ours(variant: str, args) -> Result:
    """The default path of a run: data module, LitVLM and trainer, with a switch for ablations."""
    import tempfile
    from functools import partial

    import pytorch_lightning as pl
    import torch

    from triptych.adapt import fingerprint
    from triptych.data.cache import FeatureCache
    from triptych.data.datamodule import DataModule
    from triptych.hardware import keep_memory, quiet_libraries
    from triptych.lit import LitVLM
    from triptych.objectives.tokens import NextToken
    from triptych.optim import Optim

    if variant != "without_kept_memory":
        keep_memory()
    quiet_libraries()
    pl.seed_everything(0, verbose=False)
    model = model_a.ours()
    whole = groups(args)
    whole = whole[: args.images] * args.warm + whole
    processor = model.processor()
    objective = NextToken()
    samples = [s for group in whole for s in group]
    data = InOrder.of(DataModule)(
        samples, processor, objective, args.images, len(whole[0]), max_length=8192
    )
    data.groups = whole
    switch_off(variant, model, processor, objective, data)
    if variant != "without_feature_cache":
        cache = FeatureCache(tempfile.mkdtemp(), model.vision, fingerprint(model.vision))
        cache.fill(data.references(), 8, progress=False)
        processor.images.cached = cache
    optim = Optim(
        partial(torch.optim.AdamW, weight_decay=0.0), LR, warmup=0, schedule="constant", clip=1.0
    )
    clock, losses = Clock(args.warm), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_):
            clock.begin()

        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(float(outputs["loss"]))
            clock.end()

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[Watch()],
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    with clock.memory:
        trainer.fit(LitVLM(model, objective, optim), datamodule=data)
    return clock.result(args, losses[args.warm :], work(variant, args))


class InOrder:
    """Rows in the order given, so that both sides take the same batches."""

    @classmethod
    def of(cls, base: type) -> type:
        return type("DataInOrder", (cls, base), {})

    def train_dataloader(self):
        loader = super().train_dataloader()
        starts, rows = 0, []
        for group in self.groups:
            each = 1 if self.alone else len(group)
            rows += [
                tuple(range(starts + i, starts + i + each)) for i in range(0, len(group), each)
            ]
            starts += len(group)
        self.sampler.plan.rows = lambda epoch: rows
        self.sampler.plan.__class__ = type("Plan", (Fixed, type(self.sampler.plan)), {})
        self.sampler.plan.count = len(rows)
        self.sampler.batch_size = self.batch_size * (len(self.groups[0]) if self.alone else 1)
        return loader

    alone = False


class Fixed:
    def __len__(self) -> int:
        return self.count


def switch_off(variant: str, model, processor, objective, data) -> None:
    """Take one optimisation away; the numbers stay."""
    from peft.tuners.lora import Linear

    from triptych.parts import flat_rows
    from triptych.parts.thin_lora import ThinLinear

    if variant == "without_shared_rows":
        data.alone = True
    elif variant == "without_flat_rows":
        model.language._flat = False
    elif variant == "without_last_block":
        flat_rows.READ = 0.0
    elif variant == "without_thin_lora":
        for module in model.modules():
            if type(module) is ThinLinear:
                module.__class__ = Linear
    elif variant == "without_supervised_head":
        objective.forward = all_positions
    elif variant == "without_token_cache":
        processor._cache = Forgetful()


class Forgetful(dict):
    def __setitem__(self, key, value) -> None:
        pass


def all_positions(model, batch):
    """The loss with the head at every position, as a class with labels computes it."""
    import torch.nn.functional as F

    from triptych.parts.attention import predecessors
    from triptych.types import IGNORE, Term

    tokens = batch.text["language"]
    log = F.log_softmax(model.logits(model(batch)).float(), -1)  # (B,T,V)
    rows, columns = (tokens.labels != IGNORE).nonzero(as_tuple=True)
    before = predecessors(tokens)[rows, columns]
    return {"next_token": Term(-log[rows, before, tokens.labels[rows, columns]].sum())}


# ---------------------------------------------------------------- counting


class Clock:
    """Seconds of the timed steps, data included, and memory of all."""

    def __init__(self, warm: int) -> None:
        self.warm, self.step, self.memory = warm, 0, Memory()
        self.started = self.ended = 0.0

    def begin(self) -> None:
        if self.step == self.warm and not self.started:
            self.started = self.ended or time.perf_counter()

    def end(self) -> None:
        self.step += 1
        self.ended = time.perf_counter()

    def result(self, args, losses: list[float], counted: dict) -> Result:
        seconds = self.ended - self.started
        return finished(
            args.steps * batch_size(args),
            seconds,
            tokens=counted["real"],
            added_mib=self.memory.added_mib,
            flops=counted["flops"],
            losses=losses,
            more={"padding": counted["padding"]},
        )


def work(variant: str, args) -> dict:
    """Real tokens, share of padding, and FLOP of the timed steps, as the variant does them."""
    processor = _processor()
    per_token = 4 * model_a.LINEAR + 6 * model_a.LORA
    real = padded = scored = shared = 0
    whole = groups(args)
    for start in range(0, len(whole), args.images):
        encoded = [
            [processor.encode(s) for s in group] for group in whole[start : start + args.images]
        ]
        alone = [len(e) for group in encoded for e in group]
        real += sum(alone)
        padded += max(alone) * len(alone)
        scored += sum(sum(x != -100 for x in e.labels) for group in encoded for e in group)
        shared += sum(len(g[0].prefix) + sum(len(e.ids) for e in g) for g in encoded)
    images, samples = len(whole), args.steps * batch_size(args)
    if variant in PEERS:
        flops = padded * (per_token + 4 * model_a.HEAD)
        flops += samples * (model_a.IMAGE + model_a.PROJECTED)
        return {"real": real, "padding": 1 - real / padded, "flops": flops}
    run = real if variant == "without_shared_rows" else shared
    flops = run * per_token + scored * 4 * model_a.HEAD + images * model_a.PROJECTED
    if variant != "without_last_block":
        flops -= 4 * model_a.LAST * (run - scored)
    return {"real": real, "padding": 0.0, "flops": flops}


def _processor():
    from triptych.data.processor import ChatProcessor
    from triptych.parts.language import load_tokenizer

    tokenizer = load_tokenizer(str(model_a.folder()), model_a.TEMPLATE)
    return ChatProcessor(tokenizer, None, 64, max_length=8192)


# ---------------------------------------------------------------- parity


def check(args) -> Result:
    """One batch on the same weights: loss and gradients of the trained tensors, both ways."""
    import torch

    from triptych.objectives.tokens import NextToken

    groups_ = groups(args)[: args.images]
    library, own, objective = model_a.library(), model_a.ours(), NextToken()
    _, collate = collator(args)
    theirs = library(**collate(opened(model_a.records(groups_))), use_cache=False).loss
    theirs.backward()
    batch = own.processor().rows(groups_)
    loss = objective(own, batch)["next_token"].sum / objective.counts(batch)["next_token"]
    loss.backward()
    expected = {
        n[n.index("layers.") :]: p.grad for n, p in library.named_parameters() if "lora_" in n
    }
    worst = 0.0
    for name, parameter in own.named_parameters():
        if "lora_" in name:
            other = expected[name[name.index("layers.") :]]
            worst = max(
                worst, float((parameter.grad - other).norm() / other.norm().clamp_min(1e-12))
            )
    difference = abs(loss.item() - theirs.item())
    if difference > 1e-5 or worst > 1e-4 or not math.isfinite(difference):
        raise SystemExit(f"the losses differ by {difference}, the gradients by {worst}")
    torch.set_grad_enabled(True)
    return {"loss": theirs.item(), "loss_difference": difference, "gradient_difference": worst}


def measure(variant: str, args) -> Result:
    if variant == "naive":
        return naive(variant, args)
    return peer(variant, args) if variant in PEERS else ours(variant, args)


def main() -> None:
    parse = side_by_side.parser(__doc__)
    parse.add_argument("--data", choices=("easy", "varied"), default="easy")
    parse.add_argument("--each", type=int, default=1, help="questions of an image (varied)")
    parse.add_argument("--images", type=int, default=None, help="images of a step")
    parse.add_argument("--steps", type=int, default=None)
    parse.add_argument("--warm", type=int, default=3, help="steps before the clock starts")
    parse.add_argument("--ablate", action="store_true")
    args = parse.parse_args()
    args.images = args.images or {"easy": 4, "varied": max(1, 8 // args.each)}[args.data]
    args.steps = args.steps or (2 if args.quick else 8)
    if args.quick and args.data == "easy":
        args.images = 1
    name = "instruct" if args.data == "easy" else f"instruct_varied{args.each}"
    variants = ("naive", "trainer+trl_collator", "trl_sft", "ours")
    against = "trainer+trl_collator" if args.data == "easy" else "naive"
    if args.data == "varied":
        variants = ("naive", "ours")
    if args.ablate:
        name, variants, against = f"{name}_ablation", ("ours", *ABLATIONS), "ours"
    side_by_side.main(name, args, variants, check, measure, against)


if __name__ == "__main__":
    main()
