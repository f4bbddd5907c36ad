"""What a run was made with: code, libraries, machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "triptych",
    "torch",
    "transformers",
    "peft",
    "pytorch-lightning",
    "hydra-core",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
    "wandb",
)


def system_info(cfg: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Git state, versions, processors and memory, as plain values for JSON.

    `cfg` (resolved, plain containers) adds its hash, which is equal for equal configurations.
    What cannot be found out is None; nothing here raises.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    info = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git": git_state(_checkout()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "usable": _usable_cores()},
        "memory_gib": _memory_gib(),
        "gpus": [{"name": g.name, "memory_gib": round(g.total_memory / 2**30, 1)} for g in gpus],
        "torch_threads": torch.get_num_threads(),
    }
    if cfg is not None:
        text = json.dumps(cfg, sort_keys=True, default=str)
        info["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return info


def git_state(folder: Path) -> dict[str, Any] | None:
    """`{"commit", "dirty"}` of the repository around a folder, None if there is none or no git."""

    def git(*args: str) -> str:
        # Without optional locks `status` does not disturb a commit that goes on elsewhere.
        command = ["git", "--no-optional-locks", "-C", str(folder), *args]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _checkout() -> Path:
    """The project's own checkout, or, if it is installed as a wheel, where the user works."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() else Path.cwd()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(size / 2**30, 1)
