"""Measures a model directory on one task by free-running generation; one JSON line on stdout.

python scripts/evaluate_tiny_anole.py --task maze --split easy --n 500 --seed 0
python scripts/evaluate_tiny_anole.py --task ghost --context markov --n 500
python scripts/evaluate_tiny_anole.py --task frozen_lake --dare demo --n 500

With --dare the line also has FLOPs and KV bytes of all generate calls, from the reports, beside
those of the same tokens unpruned. Ghost Letters always runs through DARE (its images come in
between hops); without --dare it prunes nothing.
"""

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, ChameleonProcessor

from dare_hf import DareConfig, apply_dare, last_report
from dare_hf.demo.embedded import demo_config, safe_config
from dare_hf.tasks import frozen_lake, ghost, ghost_run, maze, mvot

_COSTS = ("flops", "kv_bytes")
TASKS = {
    "maze": (maze, mvot.solve),
    "frozen_lake": (frozen_lake, mvot.solve),
    "ghost": (ghost, ghost_run.solve),
}


def steps(item: mvot.Item) -> int:
    """Number of actions, or of images after the first."""
    return len(item.points if isinstance(item, ghost.GhostItem) else item.actions)


def by_length(solutions: list[mvot.Solution]) -> dict[str, list[float]]:
    """Number of steps -> [items, share answered right]."""
    groups: dict[int, list[bool]] = {}
    for solution in solutions:
        groups.setdefault(steps(solution.item), []).append(solution.correct)
    return {str(k): [len(v), round(sum(v) / len(v), 4)] for k, v in sorted(groups.items())}


def config_of(name: str, task: str, processor: ChameleonProcessor) -> DareConfig:
    """Shipped rates ("demo") or the preset ("safe"), with hops as the task has them."""
    config = demo_config(processor) if name == "demo" else safe_config(processor)
    if task == "ghost":
        config.hop_delimiters = ghost_run.delimiters(processor)
    return config


class Costs:
    """Adds up the reports of generate calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.totals = dict.fromkeys(("flops", "flops_full", "kv_bytes", "kv_bytes_full"), 0)

    def __call__(self, batch: mvot.BatchOutput) -> None:
        """Takes over the last call's report."""
        report = last_report(self.model)
        self.totals["flops"] += sum(report.flops.values())
        self.totals["flops_full"] += sum(report.flops_baseline.values())
        self.totals["kv_bytes"] += report.kv_bytes
        self.totals["kv_bytes_full"] += report.kv_bytes_baseline

    def result(self) -> dict[str, float]:
        """Totals and ratios."""
        shares = {name: self.totals[name] / self.totals[f"{name}_full"] for name in _COSTS}
        return self.totals | {f"{name}_ratio": round(share, 4) for name, share in shares.items()}


def main() -> None:
    """Parses the command line, solves the items and prints the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--task", choices=list(TASKS), default="maze")
    parser.add_argument("--context", choices=get_args(mvot.Context), default="append_all")
    parser.add_argument("--split", choices=["easy", "hard"], default="easy")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--dare", choices=["demo", "safe"], help="prune, training-free")
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model is None:
        from dare_hf.assets import model_path

        args.model = model_path("dare-tiny-anole")
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    started = time.perf_counter()
    task, solve = TASKS[args.task]
    costs = None
    if args.dare:
        apply_dare(model, config_of(args.dare, args.task, processor))
        costs = Costs(model)
    solutions = solve(
        model,
        processor,
        task.sample(args.n, args.split, args.seed),
        args.batch_size,
        context=args.context,
        on_batch=costs,
        progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
    )
    score = asdict(mvot.score(solutions))
    result = {
        "task": args.task,
        "dare": args.dare,
        "context": args.context,
        "split": args.split,
        "seed": args.seed,
        **{k: v for k, v in score.items() if not (isinstance(v, float) and math.isnan(v))},
        "by_length": by_length(solutions),
        **(costs.result() if costs else {}),
        "seconds": round(time.perf_counter() - started, 1),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    wrong = [s for s in solutions if not s.correct or not all(s.image_correct)]
    for solution in wrong[: args.failures]:
        flags = "".join("+" if flag else "-" for flag in solution.image_correct)
        print(solution.item.answer, flags, repr(solution.text), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
