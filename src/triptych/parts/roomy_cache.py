"""A cache of keys and values with room for what comes, so that a new token copies none of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # tokens that fit behind the kept ones before they move


class RoomyLayer(DynamicLayer):
    """The library's growing layer, whose `cat` at each step copied all that was kept.

    What it hands out is a view into its room. Whoever puts other tensors in its place (beams,
    chosen rows, a crop) is noticed, and what they left moves to a new room.
    """

    _rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B,heads,T+new,d) keys and values, `key` and `value` (B,heads,new,d) the last of them."""
        if self.get_seq_length() == 0:
            return super().update(key, value, *args, **kwargs)
        one, other = self._rooms or (None, None)
        self.keys, one = _behind(self.keys, key, one)
        self.values, other = _behind(self.values, value, other)
        self._rooms = (one, other)
        return self.keys, self.values


def with_room(cache: DynamicCache) -> DynamicCache:
    """The same cache; its plain layers grow in place from now on."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = RoomyLayer
    return cache


def _behind(kept: Tensor, new: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """`kept` with `new` behind it, and the room that both lie in."""
    start, end = kept.shape[2], kept.shape[2] + new.shape[2]
    if room is None or not _inside(kept, room) or room.shape[2] < end:
        room = kept.new_empty(*kept.shape[:2], end + ROOM, kept.shape[3])
        room[:, :, :start] = kept
    room[:, :, start:end] = new
    return room[:, :, :end], room


def _inside(kept: Tensor, room: Tensor) -> bool:
    """Whether `kept` is the beginning of `room`."""
    begins = kept.data_ptr() == room.data_ptr() and kept.stride() == room.stride()
    return begins and kept.shape[:2] == room.shape[:2]
