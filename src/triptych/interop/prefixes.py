"""Rename the tensors of a published checkpoint to ours and back, by a table of prefixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from triptych.types import TriptychError

Table = Sequence[tuple[str, str]]  # (their prefix, our prefix)


def to_ours(state: Mapping[str, Tensor], table: Table, source: str) -> dict[str, Tensor]:
    """Their tensors under our names; the longest prefix decides, and a leftover is an error."""
    return {_renamed(name, table, source): tensor for name, tensor in state.items()}


def to_theirs(state: Mapping[str, Tensor], table: Table, source: str) -> dict[str, Tensor]:
    """Our tensors under their names."""
    return to_ours(state, [(ours, theirs) for theirs, ours in table], source)


def load(
    model: nn.Module, state: Mapping[str, Tensor], source: str, never_run: Sequence[str] = ()
) -> None:
    """Fill a model; every tensor must be there once and have its shape.

    never_run: prefixes of ours that the published layout keeps elsewhere and this wiring skips.
    """
    own = model.state_dict(keep_vars=True)
    lacking = sorted(n for n in own.keys() - state.keys() if not n.startswith(tuple(never_run)))
    left = sorted(state.keys() - own.keys())
    if lacking or left:
        odd = f"lacks {lacking[0]}" if lacking else f"holds {left[0]}, which this model has not"
        raise TriptychError(
            f"{source} {odd} ({len(lacking)} lacking, {len(left)} left over); check that it is a "
            "checkpoint of this family and size."
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise TriptychError(
                    f"{source}: {name} has shape {tuple(tensor.shape)} and the model needs "
                    f"{tuple(own[name].shape)}; check that it is a checkpoint of this size."
                )
            own[name].copy_(tensor)


def _renamed(name: str, table: Table, source: str) -> str:
    matches = [(theirs, ours) for theirs, ours in table if name.startswith(theirs)]
    if not matches:
        raise TriptychError(
            f"{source} holds {name}, for which this family has no place; is it another family?"
        )
    theirs, ours = max(matches, key=lambda pair: len(pair[0]))
    return ours + name.removeprefix(theirs)
