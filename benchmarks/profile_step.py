"""The ten largest items of the default training step, and its share of a GEMM of the same run.

python benchmarks/profile_step.py [--quick]

The step of instruct.py (model A, easy-VQA, features cached), by operator as torch's profiler counts
its own time on the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import model_a
import side_by_side

WHAT = {
    "aten::mm": "matrix product: frozen linear layers, and the thin ones of LoRA",
    "aten::addmm": "matrix product with its sum: the projector",
    "aten::addmm_": "matrix product: LoRA's second thin product, added in place",
    "aten::bmm": "matrix product",
    "aten::linear": "matrix product",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention, backward",
    "aten::copy_": "copies: slices of rows made contiguous, positions picked",
    "aten::mul": "elementwise: norms, SiLU gate, rotary positions",
    "aten::add": "elementwise: residuals, rotary positions, sums of gradients",
    "aten::add_": "elementwise: sums of gradients",
    "aten::div": "elementwise: AdamW's second moments, gradients of norms",
    "aten::silu": "elementwise: activation of the MLP",
    "aten::silu_backward": "elementwise: activation of the MLP, backward",
    "aten::cat": "copies: rows of attention joined, rotary halves joined",
    "aten::_log_softmax": "loss over the vocabulary, at supervised positions",
    "aten::_log_softmax_backward_data": "loss over the vocabulary, backward",
    "aten::index": "supervised positions and real tokens picked",
    "aten::_index_put_impl_": "visual tokens written at their places",
    "aten::_foreach_": "optimizer",
    "aten::sum": "sums: gradients of norms",
    "aten::pow": "elementwise: norms",
    "aten::mean": "elementwise: norms",
    "aten::zeros": "buffers of positions that are not read",
    "aten::fill_": "buffers of positions that are not read",
    "aten::neg": "rotary positions",
}


def main() -> None:
    args = side_by_side.parser(__doc__).parse_args()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from triptych.adapt import fingerprint
    from triptych.data.cache import FeatureCache
    from triptych.hardware import keep_memory
    from triptych.objectives.tokens import NextToken

    torch.set_num_threads(args.threads)
    keep_memory()
    model, objective = model_a.ours(), NextToken()
    groups = model_a.easy_groups(1 if args.quick else 4)
    processor = model.processor()
    refs = (ref for group in groups for s in group for ref in s.images)
    processor.images.cached = FeatureCache(
        tempfile.mkdtemp(), model.vision, fingerprint(model.vision)
    )
    processor.images.cached.fill(refs, 8, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        batch = processor.rows(groups)
        count = objective.counts(batch)["next_token"]
        (objective(model, batch)["next_token"].sum / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    steps = 1 if args.quick else 8
    step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(steps):
            step()
    events = sorted(seen.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    total = sum(e.self_cpu_time_total for e in events)
    rows = [
        {
            "name": e.key,
            "share": e.self_cpu_time_total / total,
            "calls": round(e.count / steps, 1),
            "what": next(
                (
                    w
                    for k, w in WHAT.items()
                    if e.key == k or (k.endswith("_") and e.key.startswith(k))
                ),
                "see the text",
            ),
        }
        for e in events[:10]
    ]
    shared = sum(
        len(processor.encode(g[0]).prefix) + sum(len(processor.encode(s).ids) for s in g)
        for g in groups
    )
    scored = sum(x != -100 for g in groups for s in g for x in processor.encode(s).labels)
    flops = shared * (4 * model_a.LINEAR + 6 * model_a.LORA) + scored * 4 * model_a.HEAD
    flops += len(groups) * model_a.PROJECTED - 4 * model_a.LAST * (shared - scored)
    gemm = side_by_side.gemm_gflops()
    rate = flops / seconds / 1e9
    summary = (
        f"A step of {len(groups)} images and {sum(map(len, groups))} questions takes "
        f"{seconds * 1e3:.0f} ms: {rate:.0f} GFLOP/s, {rate / gemm:.0%} of the {gemm:.0f} of a "
        "2048 x 2048 x 2048 product in the same process."
    )
    for row in rows:
        print(f"{row['share']:6.1%}  {row['calls']:7g}  {row['name']:55s} {row['what']}")
    print(summary)
    report = {"name": "profile", "quick": args.quick, "rows": rows, "summary": summary}
    report["machine"] = side_by_side.machine(args.threads)
    side_by_side.RESULTS.mkdir(exist_ok=True)
    name = f"profile{'_quick' if args.quick else ''}.json"
    (side_by_side.RESULTS / name).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
