"""From a configuration to objects: the only file that calls hydra's instantiate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from triptych.adapt import Quantization, adapt, fingerprint
from triptych.models.base import Model
from triptych.table import PartsTable, merge
from triptych.targets import locate
from triptych.types import TriptychError

if TYPE_CHECKING:
    from triptych.data.datamodule import DataModule
    from triptych.objectives.base import Objective
    from triptych.optim import Optim

OUR_KEYS = ("name", "trains")  # of conf/model: read here, not by the wiring
DATA_KEYS = ("name", "path", "images")  # of conf/data: what its readers refer to


@dataclass
class Adapted:
    """A model in the state its parts table asks for, and what its bases were before."""

    model: Model
    table: PartsTable
    bases: dict[str, str]  # role -> fingerprint of the untouched weights


def build(node: DictConfig, **objects: Any) -> Any:
    """Instantiate a node, finished with objects; a mistake in it is said in a sentence."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        # finished outside hydra, which would turn dataclasses among the objects into configs
        finish = instantiate(node, _convert_="all", _partial_=True)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, TriptychError):
            cause = cause.__cause__ or cause.__context__
        raise (cause or error) from error
    return finish(**objects)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything heavy is loaded."""
    if is_remote(cfg.model):
        raise TriptychError(
            f"model={cfg.model.name} answers from afar and has no weights here; use it with "
            "evaluate.py."
        )
    quantized = cfg.quantization.method != "none"
    if cfg.peft.name == "qlora" and not quantized:
        raise TriptychError(
            "peft=qlora trains adapters over a quantized base, and quantization=none gives none; "
            "use peft=lora, or quantization=nf4."
        )
    accumulate = cfg.trainer.get("accumulate_grad_batches", 1)
    if accumulate < 1:
        raise TriptychError("trainer.accumulate_grad_batches starts at 1.")
    if cfg.trainer.get("devices", 1) not in (1, "1") and cfg.quantization.method == "int8":
        raise TriptychError(
            "quantization=int8 trains on one device; use nf4, or trainer.devices=1."
        )


def is_remote(model: DictConfig) -> bool:
    """Whether a model's node names a predictor of its own, with no weights here."""
    kind = locate(str(model._target_), "model")
    return isinstance(kind, type) and not issubclass(kind, torch.nn.Module)


def build_model(cfg: DictConfig, asked: Sequence[str] = (), meta: bool = False) -> Adapted:
    """Build the model, merge the parts tables and adapt it.

    asked: parts written on the command line ("language", "connector.qformer"). meta: shapes only,
    without weights, memory or network.
    """
    check(cfg)
    with torch.device("meta" if meta else "cpu"):
        model: Model = build(without(cfg.model, OUR_KEYS))
    bases = {} if meta else {role: fingerprint(getattr(model, role)) for role in model.roles}
    family, preset, otherwise = (
        OmegaConf.to_container(node, resolve=True)
        for node in (cfg.model.trains, cfg.peft.roles, cfg.peft.otherwise)
    )
    names = (f"model={cfg.model.name}", f"peft={cfg.peft.name}")
    table = merge(model, family, preset, otherwise, asked, names)
    lora = build(cfg.peft.lora) if table.roles("lora") else None
    quantization: Quantization = build(cfg.quantization)
    adapt(model, table, lora, quantization)
    checkpoint_parts(model, cfg.get("memory", {}).get("checkpoint", []))
    return Adapted(model, table, bases)


def checkpoint_parts(model: Model, roles: Sequence[str]) -> None:
    """Let these parts keep the input of a block alone and compute the rest again in backward."""
    for role in roles:
        library = _library_model(model, role, "memory.checkpoint")
        if not getattr(library, "supports_gradient_checkpointing", False):
            raise TriptychError(
                f"memory.checkpoint names '{role}', whose {type(library).__name__} cannot "
                "recompute its blocks; leave it out."
            )
        library.gradient_checkpointing_enable({"use_reentrant": False})


def compile_parts(model: Model, roles: Sequence[str]) -> None:
    """Compile these parts by torch.compile, in place: names of tensors stay as they are."""
    for role in roles:
        library = _library_model(model, role, "compile")
        getattr(library, "base_model", library).compile(dynamic=True)


def _library_model(model: Model, role: str, key: str) -> Any:
    library = getattr(getattr(model, role, None), "model", None)
    if library is None:
        raise TriptychError(
            f"{key} names '{role}', which is no library model of this one; it takes some of "
            f"{', '.join(r for r in model.roles if hasattr(getattr(model, r), 'model'))}."
        )
    return library


def build_optim(cfg: DictConfig) -> Optim:
    return build(cfg.optim, parts=OmegaConf.to_container(cfg.optim.parts))


def build_objective(cfg: DictConfig, accumulate: int) -> Objective:
    """The objective; one that compares the samples of a batch refuses plain accumulation."""
    objective = build(cfg.objective)
    if objective.in_batch and accumulate > 1:
        raise TriptychError(
            "trainer.accumulate_grad_batches splits the batch, and this objective compares all its "
            "samples with each other; raise data.batch_size and set objective.chunk instead."
        )
    return objective


def build_data(cfg: DictConfig, processor: Any, objective: Objective) -> DataModule:
    """The data module with its readers, tied to one model's processor."""
    return build(
        without(cfg.data, DATA_KEYS),
        processor=processor,
        objective=objective,
        seed=cfg.seed,
        accumulate=cfg.trainer.get("accumulate_grad_batches", 1),
    )


def without(node: DictConfig, keys: Sequence[str]) -> DictConfig:
    """A resolved copy of a node that lacks these keys."""
    resolved = OmegaConf.to_container(node, resolve=True)
    return OmegaConf.create({k: v for k, v in resolved.items() if k not in keys})


def parts_asked(overrides: Sequence[str]) -> list[str]:
    """Parts named by overrides such as `model.trains.vision=full` or `+peft.roles.text=lora`."""
    keys = [o.lstrip("+~").partition("=")[0] for o in overrides]
    prefixes = ("model.trains.", "peft.roles.")
    return [k.removeprefix(p) for k in keys for p in prefixes if k.startswith(p)]
