"""Training: the audit, accumulation, resume, bundles and what stops a run."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from triptych.adapt import Quantization, adapt, fingerprint
from triptych.audit import Audit
from triptych.build import Adapted
from triptych.bundle import load_trained, save_bundle, trained_tensors
from triptych.callbacks import FiniteGuard
from triptych.checkpoint import Checkpoints, latest
from triptych.data.cache import FeatureCache
from triptych.data.datamodule import DataModule
from triptych.lit import LitVLM
from triptych.objectives.tokens import NextToken
from triptych.optim import Optim
from triptych.table import merge
from triptych.types import ImageRef, TriptychError

FAMILY = {"vision": "frozen", "connector": "full", "language": "full"}


@pytest.fixture
def reader(dialogue):
    """Twelve samples over four pictures, three to a picture."""
    words = ("red", "blue", "green", "yes")
    return [
        dialogue(("what color is it?"[: 8 + q], words[(i + q) % 4]), images=(i,), name=f"{i}-{q}")
        for i in range(4)
        for q in range(3)
    ]


def adapted_model(vlm, preset=None, dropout=0.0, quantization="none") -> Adapted:
    from peft import LoraConfig

    bases = {role: fingerprint(getattr(vlm, role)) for role in vlm.roles}
    table = merge(vlm, FAMILY, preset or {}, {})
    torch.manual_seed(5)
    adapt(vlm, table, LoraConfig(r=4, lora_dropout=dropout), Quantization(quantization))
    return Adapted(vlm, table, bases)


def optim(**options) -> Optim:
    settings = {"lr": 1e-2, "warmup": 0, "schedule": "constant", **options}
    return Optim(settings.pop("optimizer", torch.optim.AdamW), **settings)


def fit(model, reader, steps, callbacks=(), batch_size=1, accumulate=1, ckpt=None, **options):
    data = DataModule(
        reader,
        model.processor(),
        NextToken(),
        batch_size=batch_size,
        accumulate=accumulate,
        seed=0,
        workers=options.pop("workers", 0),
    )
    module = LitVLM(model, NextToken(), optim(**options))
    trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return trainer


def clone(tiny):
    """The model of the `vlm` fixture, built once more."""
    from triptych.models.fusion import Prefix
    from triptych.models.vlm import VLM
    from triptych.parts.connector import MLPConnector
    from triptych.parts.language import LanguageModel
    from triptych.parts.vision import VisionEncoder

    torch.manual_seed(1)
    vision = VisionEncoder(str(tiny / "vision"), layer=-2)
    language = LanguageModel(str(tiny / "language"))
    return VLM(vision, partial(MLPConnector, depth=2), language, Prefix())


def test_four_small_batches_step_like_one_large_batch(tiny, reader):
    """Rows differ in length: a mean of means would not pass. (Adam would divide by noise.)"""
    after = []
    for batch_size, accumulate in ((4, 1), (1, 4), (2, 2)):
        model = adapted_model(clone(tiny)).model
        sizes = {"batch_size": batch_size, "accumulate": accumulate}
        fit(model, reader, 2, optimizer=torch.optim.SGD, clip=None, **sizes)
        after.append(trained_tensors(model))
    for other in after[1:]:
        for name, tensor in after[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_audit_names_a_part_behind_no_grad(vlm, reader):
    model = adapted_model(vlm).model
    inner = model.connector.forward

    def cut(*args):
        with torch.no_grad():
            return inner(*args)

    model.connector.forward = cut
    with pytest.raises(TriptychError, match="without a gradient.*connector.layers.0"):
        fit(model, reader, 3, [Audit()])


def test_the_audit_names_a_part_whose_gradient_stays_zero(vlm, reader):
    model = adapted_model(vlm).model
    inner = model.connector.forward
    model.connector.forward = lambda *a: inner(*a)._replace(tokens=inner(*a).tokens * 0.0)
    with pytest.raises(TriptychError, match="zero in each of the first 3 steps.*connector"):
        fit(model, reader, 4, [Audit()])


def test_the_audit_is_silent_in_warm_up_and_with_lora(vlm, reader):
    model = adapted_model(vlm, {"language": "lora"}).model
    trainer = fit(model, reader, 6, [Audit()], warmup=4)
    assert trainer.global_step == 6  # step 0 has a learning rate of 0, LoRA's A no gradient


def test_the_audit_notices_a_frozen_tensor_that_changed(vlm, reader):
    model = adapted_model(vlm).model

    class Meddle(pl.Callback):
        def on_train_end(self, trainer, module):
            module.model.vision.model.pre_layrnorm.bias.data[3] += 1e-3

    with pytest.raises(TriptychError, match="frozen tensors that training changed.*pre_layrnorm"):
        fit(model, reader, 1, [Audit(), Meddle()])


def test_nan_stops_with_the_samples_names_and_keeps_the_weights(vlm, reader):
    model = adapted_model(vlm).model
    before = {n: t.clone() for n, t in trained_tensors(model).items()}
    inner = model.connector.forward
    model.connector.forward = lambda *a: inner(*a)._replace(tokens=inner(*a).tokens * float("nan"))
    with pytest.raises(TriptychError, match=r"\d-\d"):
        fit(model, reader, 2, [FiniteGuard()])
    assert all(torch.equal(before[n], t) for n, t in trained_tensors(model).items())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_resume_in_the_middle_of_an_epoch_is_bit_exact(
    tiny, reader, tmp_path, workers, quantization
):
    """Seven steps in one go, and three plus four, with dropout: the same bits."""

    def run(folder, steps, ckpt=None):
        model = adapted_model(clone(tiny), {"language": "lora"}, 0.2, quantization).model
        torch.manual_seed(7 if ckpt is None else 99)
        saver = Checkpoints(folder, steps=3)
        fit(model, reader, steps, [saver], ckpt=ckpt, workers=workers)
        return trained_tensors(model)

    whole = run(tmp_path / "whole", 7)
    run(tmp_path / "part", 3)
    resumed = run(tmp_path / "part", 7, ckpt=latest(tmp_path / "part"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)


def test_samples_that_cannot_travel_are_refused_before_workers_hang(vlm, reader):
    reader[0].images[0] = ImageRef("key", lambda: None, "mine")
    with pytest.raises(TriptychError, match="data.workers=0"):
        fit(adapted_model(vlm).model, reader[:1], 1, workers=2)


def test_a_checkpoint_holds_what_trains_and_no_more(vlm, reader, tmp_path):
    model = adapted_model(vlm, {"language": "lora"}).model
    fit(model, reader, 4, [Checkpoints(tmp_path, steps=1)])
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "step-00000003.ckpt",
        "step-00000004.ckpt",
    ]
    state = torch.load(latest(tmp_path), weights_only=True)["state_dict"]
    assert all("lora_" in n or n.startswith("model.connector") for n in state)


def test_a_checkpoint_of_another_table_is_refused(tiny, reader, tmp_path):
    fit(adapted_model(clone(tiny), {"language": "lora"}).model, reader, 1, [
        Checkpoints(tmp_path, steps=1)
    ])  # fmt: skip
    with pytest.raises(TriptychError, match="another parts table"):
        fit(adapted_model(clone(tiny)).model, reader, 2, ckpt=latest(tmp_path))


def test_a_write_that_fails_leaves_the_last_good_checkpoint(vlm, reader, tmp_path, monkeypatch):
    model = adapted_model(vlm, {"language": "lora"}).model
    saver = Checkpoints(tmp_path, steps=1)
    write = pl.Trainer.save_checkpoint

    def full_disk(self, path, **kwargs):
        if self.global_step == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(self, path, **kwargs)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full_disk)
    with pytest.raises(TriptychError, match="No space left.*ckpt=last from step-00000001"):
        fit(model, reader, 3, [saver])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.ckpt"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_bundle_brings_the_trained_model_back(tiny, reader, tmp_path, quantization):
    from omegaconf import OmegaConf

    def built():
        return adapted_model(clone(tiny), {"language": "lora"}, 0.0, quantization)

    trained = built()
    fit(trained.model, reader, 3)
    processor = trained.model.processor()
    folder = save_bundle(tmp_path / "bundle", trained, processor, OmegaConf.create({}), {})
    fresh = built()
    batch = processor.collate(reader[:3])
    with torch.no_grad():
        expected = trained.model.eval()(batch)
        assert not torch.equal(fresh.model.eval()(batch), expected)
        load_trained(folder, fresh)
        assert torch.equal(fresh.model.eval()(batch), expected)


def test_a_bundle_on_another_base_is_refused(tiny, reader, tmp_path):
    from omegaconf import OmegaConf

    trained = adapted_model(clone(tiny), {"language": "lora"})
    folder = save_bundle(
        tmp_path / "bundle", trained, trained.model.processor(), OmegaConf.create({}), {}
    )
    other = clone(tiny)
    with torch.no_grad():
        other.language.model.model.norm.weight[0] += 1e-3
    with pytest.raises(TriptychError, match="another base.*'language'"):
        load_trained(folder, adapted_model(other, {"language": "lora"}))


def test_cached_features_change_neither_loss_nor_gradients(vlm, reader, tmp_path):
    model = adapted_model(vlm).model
    processor, objective = model.processor(), NextToken()
    cache = FeatureCache(tmp_path, model.vision, fingerprint(model.vision))
    refs = [ref for sample in reader for ref in sample.images]
    assert cache.fill(refs, limit_gb=1.0, progress=False)

    def loss_and_gradient():
        model.zero_grad()
        loss = objective(model, processor.collate(reader))["next_token"].sum
        loss.backward()
        return loss.detach(), model.connector.layers[0].weight.grad.clone()

    fresh = loss_and_gradient()
    processor.images.cached = cache
    assert processor.collate(reader).images.pixels is None
    for ours, theirs in zip(loss_and_gradient(), fresh, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    again = FeatureCache(tmp_path, model.vision, fingerprint(model.vision))
    assert torch.equal(again(refs).tokens, cache(refs).tokens)  # another run reads the same bits
    other = FeatureCache(tmp_path, model.vision, "other weights")
    assert other.folder != cache.folder
    assert not other.fill(refs, limit_gb=0.0, progress=False)


def test_groups_give_each_part_its_rate_and_spare_norms_from_decay(vlm):
    model = adapted_model(vlm, {"language": "lora"}).model
    settings = optim(weight_decay=0.1, lora_lr=3e-4, parts={"connector": {"lr": 2e-5}})
    groups = settings.build(model).param_groups
    rates = {(g["name"].split("@")[0], g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {("connector", 2e-5, 0.1), ("connector", 2e-5, 0.0), ("language", 3e-4, 0.1)}
    counted = sum(p.numel() for g in groups for p in g["params"])
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "schedule,expected",
    [
        ("cosine", [0, 0.5, 1, 0.5, 0]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("constant", [0, 0.5, 1, 1, 1]),
    ],
)
def test_schedules_by_hand(schedule, expected):
    weight = torch.nn.Parameter(torch.zeros(1))
    settings = Optim(torch.optim.SGD, lr=1.0, warmup=4, schedule=schedule)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = settings.scheduler(optimizer, steps=12)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [round(rates[i], 6) for i in (0, 2, 4, 8, 12)] == expected
