"""Contrastive objectives: values by hand, chunks that equal one batch, ranks that equal one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from triptych.objectives import contrastive
from triptych.objectives.contrastive import InfoNCE, Sigmoid, caption_keys, pairwise_nll
from triptych.types import Batch, Images, Sample, Tokens, TriptychError


class Table(nn.Module):
    """A model whose embeddings are parameters: row i of the batch is row `ids[i]` of each table."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor, scale: float = 1.0, bias=None):
        super().__init__()
        self.images, self.texts = nn.Parameter(images.clone()), nn.Parameter(texts.clone())
        self.heads = nn.Module()
        self.heads.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.heads.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def forward(self, batch, chunk=0):
        rows = batch.slots[:, 0]
        return self.images[rows], self.texts[rows]


def pairs(rows: list[int], captions: list[int] | None = None) -> Batch:
    """A batch of the given rows of a table; `captions` are token ids, one a caption."""
    ids = torch.tensor(captions if captions is not None else rows)[:, None]
    tokens = Tokens(ids, torch.zeros_like(ids), torch.ones_like(ids))
    slots = torch.tensor([[row, b, 1] for b, row in enumerate(rows)])
    images = Images([str(i) for i in range(max(rows) + 1)])
    return Batch(images, slots, {"text": tokens}, [Sample([], id=str(r)) for r in rows])


def unit(rows: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [2, 7])
def test_equal_similarities_give_the_logarithm_of_n(rows, smoothing):
    same = unit(1).expand(rows, -1)
    model = Table(same, same, scale=20.0)
    term = InfoNCE(smoothing)(model, pairs(list(range(rows))))["contrastive"]
    assert term.sum.item() / rows == pytest.approx(math.log(rows), abs=1e-6)


def test_info_nce_by_hand():
    model = Table(torch.eye(2), torch.eye(2), scale=2.0)
    value = InfoNCE()(model, pairs([0, 1]))["contrastive"].sum.item() / 2
    assert value == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    smooth = InfoNCE(0.1)(model, pairs([0, 1]))["contrastive"].sum.item() / 2
    # 0.05 of the mass lies on the wrong column, 2 below the right one
    assert smooth == pytest.approx(math.log(1 + math.exp(-2)) + 0.05 * 2, abs=1e-6)


def test_sigmoid_by_hand():
    model = Table(torch.eye(2), torch.eye(2), scale=10.0, bias=-10.0)
    value = Sigmoid()(model, pairs([0, 1]))["contrastive"].sum.item() / 2
    right, wrong = math.log(2), math.log(1 + math.exp(-10))
    assert value == pytest.approx(right + wrong, abs=1e-6)
    with pytest.raises(TriptychError, match="model.heads.bias"):
        Sigmoid()(Table(torch.eye(2), torch.eye(2)), pairs([0, 1]))


def test_equal_captions_count_as_positives_only_when_asked():
    model = Table(unit(4), unit(4, seed=1), scale=5.0)
    with torch.no_grad():
        model.texts[3] = model.texts[0]
    batch, logits = pairs([0, 1, 2, 3], captions=[7, 8, 9, 7]), 5 * model.images @ model.texts.T
    equal = torch.eye(4).bool()
    equal[0, 3] = equal[3, 0] = True
    by_hand = 0
    for z in (logits, logits.T):
        for i in range(4):
            negatives = z[i][~equal[i]].exp().sum()
            right = z[i][equal[i]].exp()
            by_hand = by_hand - (right / (right + negatives)).log().mean() / 2
    shared = InfoNCE(positives="captions")(model, batch)["contrastive"].sum
    torch.testing.assert_close(shared, by_hand)
    plain = InfoNCE()(model, batch)["contrastive"].sum
    assert plain > shared  # a right caption was called wrong
    two = Table(unit(2), unit(2, seed=1), scale=5.0, bias=-1.0)
    z = 5 * two.images @ two.texts.T - 1
    every = Sigmoid(positives="captions")(two, pairs([0, 1], [7, 7]))["contrastive"].sum
    torch.testing.assert_close(every, -nn.functional.logsigmoid(z).sum())


def test_captions_of_one_image_can_be_positives_of_each_other():
    same = unit(1).expand(3, -1)
    model = Table(same, same, scale=4.0)
    batch = pairs([0, 0, 1], captions=[5, 6, 7])  # two captions of one image, one of another
    each = InfoNCE(positives="either")(model, batch)["contrastive"].sum.item()
    # the rows of the shared image have one negative, the third row has two
    assert each == pytest.approx(2 * math.log(2) + math.log(3), abs=1e-6)
    alone = InfoNCE(positives="captions")(model, batch)["contrastive"].sum.item()
    assert alone == pytest.approx(3 * math.log(3), abs=1e-6)


def test_one_positive_a_row_is_the_cross_entropy():
    torch.manual_seed(0)
    logits = (torch.randn(4, 6) * 5).requires_grad_()
    for smoothing in (0.0, 0.1):
        equal = nn.functional.one_hot(torch.arange(4), 6).bool()
        known = nn.functional.cross_entropy(
            logits, torch.arange(4), reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(contrastive.shared_nll(logits, equal, smoothing), known)
    every = contrastive.shared_nll(logits, torch.ones(4, 6).bool())
    assert every.item() == 0 and torch.autograd.grad(every, logits)[0].abs().max() == 0


def test_caption_keys_ignore_padding():
    ids = torch.tensor([[5, 6, 0], [5, 6, 9], [5, 6, 9]])
    segments = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    a, b, c = caption_keys(Tokens(ids, ids, segments)).tolist()
    assert a == b != c


def test_blocks_of_the_sigmoid_loss_change_nothing(monkeypatch):
    values = []
    for block in (512, 3):
        monkeypatch.setattr(contrastive, "BLOCK", block)
        images, texts = unit(8).requires_grad_(), unit(8, seed=1).requires_grad_()
        scale, bias = torch.tensor(9.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        loss = pairwise_nll(images, texts, scale, bias, torch.eye(8, dtype=torch.bool))
        values.append([loss, *torch.autograd.grad(loss, (images, texts, scale, bias))])
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# --- chunks -------------------------------------------------------------------------------------


def dropping(rate: float):
    from test_dual import SMALL, WORDS, build

    vit = {**SMALL, "image_size": 32, "patch_size": 8, "model_type": "vit"}
    words = {"model_type": "bert", **WORDS}
    for config in (vit, words):
        config |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    return build(vit, words, "mean", scale=20.0, bias=-10.0).train()


def step(model, objective, batch, seed: int = 5):
    """Loss and gradients of one batch from a given random state."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = objective(model, batch)["contrastive"].sum / len(batch.samples)
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", [InfoNCE, Sigmoid])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_chunks_give_the_loss_and_gradients_of_one_batch(kind, chunk, dual_batch):
    from test_dual import inputs

    model, batch = dropping(0.0), dual_batch(*inputs(11))
    loss, gradients = step(model, kind(), batch)
    again, chunked = step(model, kind(chunk=chunk), batch)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == chunked.keys() and "heads.logit_scale" in gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_dropout_is_replayed(dual_batch, monkeypatch):
    """With dropout, chunks equal the same chunks kept in one graph from the same random state."""
    from test_dual import inputs

    from triptych.models import dual

    model, batch = dropping(0.2), dual_batch(*inputs(10))
    objective = InfoNCE(chunk=4)
    loss, gradients = step(model, objective, batch)
    monkeypatch.setattr(dual, "checkpoint", lambda run, piece, use_reentrant: run(piece))
    kept, known = step(model, objective, batch)
    assert torch.equal(loss, kept)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, known[name], rtol=0, atol=0, msg=name)
    other, _ = step(model, objective, batch, seed=6)
    assert not torch.equal(loss, other)  # dropout was really on


def test_what_would_be_wrong_is_refused(tmp_path):
    from omegaconf import OmegaConf
    from test_dual import TEXT, VISION, build

    from triptych.build import build_objective

    model = build(VISION["resnet"], *TEXT["bert"])
    with pytest.raises(TriptychError, match="BatchNorm that trains, and with objective.chunk=4"):
        InfoNCE(chunk=4).check(model, ranks=1)
    with pytest.raises(TriptychError, match="BatchNorm that trains, and with 2 ranks"):
        InfoNCE().check(model, ranks=2)
    InfoNCE().check(model, ranks=1)
    for module in model.vision.modules():
        module._triptych_frozen = True  # as the parts table marks frozen parts
    InfoNCE(chunk=4).check(model, ranks=2)
    InfoNCE(chunk=4).check(build(VISION["vit"], *TEXT["bert"]), ranks=2)
    model = build({**VISION["resnet"]}, *TEXT["bert"])
    model.vision.statistics = "stored"
    model.train()
    InfoNCE(chunk=4).check(model, ranks=2)
    assert model.training and model.vision.training
    node = {"_target_": "triptych.objectives.contrastive.InfoNCE", "chunk": 8}
    cfg = OmegaConf.create({"objective": node})
    with pytest.raises(TriptychError, match="objective.chunk instead"):
        build_objective(cfg, accumulate=2)


# --- ranks --------------------------------------------------------------------------------------


def _rank(rank: int, world: int, folder: str) -> None:
    """One process of two: its half of the batch, gradients summed over ranks, saved."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {}
    for name, (objective, captions) in _cases().items():
        model = Table(unit(8), unit(8, seed=1), scale=7.0, bias=-2.0)
        mine = slice(rank * 4, rank * 4 + 4)
        batch = pairs(list(range(8))[mine], captions[mine])
        loss = objective(model, batch)["contrastive"].sum / 8
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        total = loss.detach()
        dist.all_reduce(total)
        results[name] = [total, *(p.grad for p in model.parameters())]
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def _cases() -> dict[str, tuple[contrastive.Contrastive, list[int]]]:
    own, shared = list(range(8)), [0, 1, 2, 3, 4, 1, 6, 3]
    return {
        "info": (InfoNCE(), own),
        "smooth": (InfoNCE(0.1), own),
        "shared": (InfoNCE(positives="captions"), shared),
        "sigmoid": (Sigmoid(), own),
        "sigmoid shared": (Sigmoid(positives="captions"), shared),
    }


def test_two_ranks_give_the_gradients_of_one(tmp_path: Path):
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, (objective, captions) in _cases().items():
        model = Table(unit(8), unit(8, seed=1), scale=7.0, bias=-2.0)
        loss = objective(model, pairs(list(range(8)), captions))["contrastive"].sum / 8
        loss.backward()
        known = [loss.detach()]
        known += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        for one, two in zip(known, results[name], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6, msg=name)
