"""What the caches take on disk: list it, empty it, keep it below a size.

python -m triptych.data.cache_room            what there is
python -m triptych.data.cache_room empty      remove all of it
python -m triptych.data.cache_room keep 20    remove the least recently used until 20 GiB are left
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from triptych.types import TriptychError

KINDS = ("features", "pixels")


class CacheSet(NamedTuple):
    """One folder of cached tensors: those of one encoder or one transform."""

    path: Path
    size: int  # bytes
    used: float  # seconds since the epoch


def cache_sets(folder: Path) -> list[CacheSet]:
    """All sets below the cache folder, the least recently used first."""
    found = []
    for path in (p for kind in KINDS for p in (folder / kind).glob("*") if p.is_dir()):
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        found.append(CacheSet(path, size, path.stat().st_mtime))
    return sorted(found, key=lambda one: one.used)


def make_room(folder: Path, limit_gb: float, used: Path) -> None:
    """Keep the caches below limit_gb; the set in use stays, and is the last to go later."""
    if used.is_dir():
        os.utime(used)
    keep(folder, limit_gb, but=used)


def keep(folder: Path, limit_gb: float, but: Path | None = None) -> int:
    """Remove the least recently used sets until the rest takes limit_gb; returns bytes freed.

    but: a set that stays whatever its size. Runs that read a removed set keep what they mapped.
    """
    sets = cache_sets(folder)
    over, freed = sum(s.size for s in sets) - limit_gb * 2**30, 0
    for one in sets:
        if freed < over and one.path != but:
            shutil.rmtree(one.path)
            freed += one.size
    return freed


def main(arguments: Sequence[str]) -> int:
    from triptych.data.cache import cache_dir

    folder = cache_dir()
    match list(arguments):
        case []:
            for one in cache_sets(folder):
                day = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
                print(f"{one.size / 2**20:10,.1f} MiB  used {day}  {one.path}")
            print(f"{sum(s.size for s in cache_sets(folder)) / 2**20:10,.1f} MiB in {folder}")
        case ["empty"]:
            print(f"{keep(folder, 0) / 2**20:,.1f} MiB removed from {folder}")
        case ["keep", size] if size.replace(".", "", 1).isdigit():
            print(f"{keep(folder, float(size)) / 2**20:,.1f} MiB removed from {folder}")
        case _:
            raise TriptychError("give nothing to list the caches, `empty`, or `keep GIB`.")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except TriptychError as error:
        sys.exit(f"error: {error}")
