"""The callbacks on a real trainer with a tiny two-part model."""

from __future__ import annotations

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from triptych.callbacks import FiniteGuard, GradNorms, Progress, Throughput
from triptych.tracking import RunLogger, read_metrics
from triptych.types import Batch, Sample, Tokens, TriptychError


def batch(index: int, value: float = 1.0) -> Batch:
    """Two samples with 3 tokens and 1 pad each; `value` is what the model reads."""
    segments = torch.tensor([[1, 1, 1, 0]] * 2)
    tokens = Tokens(torch.ones(2, 4, dtype=torch.long), segments, segments)
    made = Batch(None, None, {"language": tokens}, [Sample([], id=f"b{index}s{i}") for i in (0, 1)])
    made.totals["value"] = value
    return made


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision": nn.Linear(1, 1), "language": nn.Linear(1, 1)})

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        x = torch.full((1, 1), batch.totals["value"])
        loss = self.model["language"](self.model["vision"](x)).sum()
        if batch.totals["value"] == 0:  # a finite loss whose gradient is not
            loss = loss + (self.model["vision"].weight * 0).sqrt().sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=2)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, index: int) -> Batch:
        return batch.to(device)


def fit(folder, values, callbacks, accumulate=1, module=None, ckpt=None, epochs=1):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = module or Tiny()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=RunLogger(folder),
        callbacks=callbacks,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(c, Progress) for c in callbacks),
    )
    batches = [batch(i, value) for i, value in enumerate(values)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer, module


def test_speed_and_memory_are_in_the_rows_that_are_logged(tmp_path):
    speed = Throughput()
    fit(tmp_path, [1.0] * 8, [speed], accumulate=2)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        assert row["speed/tokens_per_s"] == pytest.approx(3 * row["speed/samples_per_s"])
        assert 0 <= row["speed/data_wait"] < 1 and row["speed/data_wait_s"] >= 0
        assert 0.05 < row["memory/peak_rss_gib"] < 100
    assert rows[-1]["speed/samples_per_s"] == pytest.approx(speed.rates["speed/samples_per_s"])


def test_waiting_for_data_is_counted_and_work_is_not(tmp_path):
    import time

    class Slow(torch.utils.data.IterableDataset):
        def __iter__(self):
            for index in range(2):
                time.sleep(0.1)
                yield batch(index)

    class Works(Tiny):
        def training_step(self, batch, index):
            time.sleep(0.05)
            return super().training_step(batch, index)

    module, speed = Works(), Throughput()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[speed], log_every_n_steps=2,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Slow(), batch_size=None))
    # The first batch is fetched before training starts or after: one or two waits of 0.1 s.
    assert 0.04 < speed.rates["speed/data_wait_s"] < 0.2
    assert 0.3 < speed.rates["speed/data_wait"] < 0.9


def test_gradient_norms_are_those_of_the_parts_before_clipping(tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            for part in ("vision", "language"):
                grads = [p.grad.flatten() for p in module.model[part].parameters()]
                seen[trainer.global_step, part] = float(torch.cat(grads).norm())

    fit(tmp_path, [1.0, 3.0, 1.0, 2.0], [Look(), GradNorms()])
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        parts = [seen[row["step"], part] for part in ("vision", "language")]
        assert [row["grad/vision"], row["grad/language"]] == pytest.approx(parts)
        assert row["grad/all"] == pytest.approx((parts[0] ** 2 + parts[1] ** 2) ** 0.5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(float("nan"), "loss is nan"), (float("inf"), "loss is"), (0.0, "gradient of vision.weight")],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_nan_stops_with_the_samples_and_leaves_the_weights_finite(tmp_path, bad, words, accumulate):
    module = Tiny()
    values = [1.0, 1.0, 1.0, bad, 1.0, 1.0]
    with pytest.raises(TriptychError, match=words) as caught:
        fit(tmp_path, values, [FiniteGuard()], accumulate, module)
    assert "b3s0, b3s1" in str(caught.value) and "b5s0" not in str(caught.value)
    if words.startswith("loss"):
        assert "b2s0" not in str(caught.value)  # the micro-batch before was fine
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert any(bool((p != q).any()) for p, q in zip(module.parameters(), fresh(), strict=True))


def fresh():
    torch.manual_seed(0)
    return list(Tiny().parameters())


def test_the_bar_shows_loss_rate_and_speed(tmp_path, capsys):
    fit(tmp_path, [1.0] * 4, [Throughput(), Progress()])
    shown = capsys.readouterr().out
    for word in ("loss=", "lr=1.00e-03", "samples/s=", "wait="):
        assert word in shown
    assert "v_num" not in shown


def test_a_continued_run_logs_every_step_once(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, out, batch, index):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    fit(tmp_path, [1.0] * 4, [Throughput(), Save()], epochs=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 5, 7]
    first = read_metrics(tmp_path)
    fit(tmp_path, [1.0] * 4, [Throughput()], epochs=3, ckpt=tmp_path / "four.ckpt")
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 5, 7, 9, 11]
    assert rows[:2] == first[:2] and rows[2] != first[2]
