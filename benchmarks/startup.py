"""How long `train.py --help` takes, and the first training step of the small default.

python benchmarks/startup.py [--quick]

Each in fresh processes, wall clock with a warm page cache; beside them the bare imports that a run
cannot avoid, and TRL's, for comparison.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import side_by_side

ROOT = Path(__file__).parents[1]
STEP = """
import sys, time, atexit
began = {began}
sys.argv = ["train.py", "model=llava", "peft=qlora", "hydra.run.dir={folder}", "benchmark=none",
            "trainer.max_steps=1", "trainer.max_epochs=1"]
sys.path.insert(0, {root!r})
import triptych.lit as lit
end = lit.LitVLM.on_train_batch_end
def first(self, *args):
    print("FIRST", time.time() - began, flush=True)
    return end(self, *args)
lit.LitVLM.on_train_batch_end = first
import train
train.main()
"""
IMPORTS = {
    "import_hydra": "import hydra",
    "import_torch": "import torch",
    "import_what_a_run_needs": "import hydra, torch, pytorch_lightning, peft\n"
    "from transformers import LlamaForCausalLM, CLIPVisionModel",
    "import_trl_sft": "from trl import SFTTrainer",
    "import_open_clip": "import open_clip",
}


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start, done.stdout


def environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}


def first_step() -> float:
    folder = tempfile.mkdtemp() + "/run"
    code = STEP.format(began=time.time(), folder=folder, root=str(ROOT))
    printed = timed([sys.executable, "-c", code])[1]  # behind the progress bar's last line
    return float(printed.partition("FIRST ")[2].split()[0])


def main() -> None:
    args = side_by_side.parser(__doc__).parse_args()
    report = {"name": "startup", "quick": args.quick, "machine": side_by_side.machine(args.threads)}
    seconds: dict[str, list[float]] = {}
    for _ in range(1 if args.quick else args.rounds):
        help_text = [sys.executable, str(ROOT / "train.py"), "--help"]
        seconds.setdefault("train.py --help", []).append(timed(help_text)[0])
        seconds.setdefault("first training step", []).append(first_step())
        for name, code in IMPORTS.items():
            seconds.setdefault(name, []).append(timed([sys.executable, "-c", code])[0])
    report["seconds"] = seconds
    for name, found in seconds.items():
        print(f"{name:28s} {statistics.median(found):6.2f} s [{min(found):.2f}-{max(found):.2f}]")
    side_by_side.RESULTS.mkdir(exist_ok=True)
    path = side_by_side.RESULTS / f"startup{'_quick' if args.quick else ''}.json"
    path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
