"""The parts table: one row a part, which says how it takes part in the training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, get_args

from torch import nn

from triptych.models.base import Model
from triptych.types import TriptychError

State = Literal["frozen", "full", "lora", "ema", "unused"]


@dataclass
class Row:
    """One part (a role, or a path below it), its state and where that was decided."""

    path: str
    state: State
    origin: str
    note: str = ""


@dataclass
class PartsTable:
    """Rows in the model's reading order; for every tensor the longest matching path decides."""

    rows: list[Row]
    skipped: list[str] = field(default_factory=list)  # what a preset named and this model lacks

    def row(self, name: str) -> Row:
        """The row that decides on the tensor or module of this name."""
        matches = [r for r in self.rows if name == r.path or name.startswith(r.path + ".")]
        if not matches:
            raise TriptychError(
                f"no row of the parts table covers '{name}'; add one to model.trains."
            )
        return max(matches, key=lambda r: len(r.path))

    def state(self, name: str) -> State:
        return self.row(name).state

    def roles(self, state: State) -> list[str]:
        return [r.path for r in self.rows if r.state == state]


def merge(
    model: Model,
    family: Mapping[str, str],
    preset: Mapping[str, str],
    fallback: Mapping[str, str],
    asked: Iterable[str] = (),
    names: tuple[str, str] = ("family", "peft"),
) -> PartsTable:
    """Join the family's table with the peft preset's, which wins for the roles it names.

    family, preset: path -> state; the path "*" stands for every role not named beside it.
    fallback: the preset's rows where the model lacks what the preset names (no language model).
    asked: paths written on the command line; naming a part the model lacks is then an error.
    A preset leaves the family's explicit `frozen` and `ema` sub-rows alone.
    """
    asked = set(asked)
    for path in [*family, *preset]:
        _check(model, path, path in asked)
    rows = {p: Row(p, s, names[0]) for p, s in _expand(model, family).items()}
    skipped = [p for p in preset if p != "*" and not has(model, p)]
    if skipped and fallback and not any(has(model, p) for p in preset if p != "*"):
        preset = fallback
    chosen = {p: s for p, s in _expand(model, preset).items() if has(model, p)}
    averaged = [p for p, r in rows.items() if r.state == "ema"]  # a teacher is never a student
    chosen = {p: s for p, s in chosen.items() if p not in averaged}
    for path, state in chosen.items():
        kept = ("frozen", "ema")
        below = [p for p, r in rows.items() if p.startswith(path + ".") and r.state not in kept]
        for other in below:
            del rows[other]
        rows[path] = Row(path, state, "command line" if path in asked else names[1])
    for path in asked & set(rows):
        rows[path].origin = "command line"
    for role in model.roles:
        if role not in rows:
            raise TriptychError(
                f"model.trains has no row for the part '{role}'; say frozen or full."
            )
    for path in model.unused:
        rows[path] = Row(path, "unused", "wiring")
    for row in rows.values():
        if row.state not in get_args(State):
            raise TriptychError(
                f"the part '{row.path}' is '{row.state}'; it takes {', '.join(get_args(State))}."
            )
    order = {role: i for i, role in enumerate(model.roles)}
    known = [r for r in rows.values() if r.path.split(".")[0] in order]
    known.sort(key=lambda r: (order[r.path.split(".")[0]], r.path))
    return PartsTable(known, skipped)


def has(model: nn.Module, path: str) -> bool:
    """Whether the model has this role, module or tensor."""
    try:
        part: object = model
        for name in path.split("."):
            part = getattr(part, name)
    except AttributeError:
        return False
    return part is not None


def _expand(model: Model, rows: Mapping[str, str]) -> dict[str, str]:
    rows = dict(rows)
    rest = rows.pop("*", None)
    return ({r: rest for r in model.roles} if rest else {}) | rows


def _check(model: Model, path: str, asked: bool) -> None:
    role, _, below = path.partition(".")
    lacks_sub_part = bool(below) and has(model, role) and not has(model, path)
    if path != "*" and not has(model, path) and (asked or lacks_sub_part):
        near = get_close_matches(role, model.roles, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(model.roles)}."
        raise TriptychError(
            f"the parts table names '{path}', which this model does not have; {hint}"
        )
