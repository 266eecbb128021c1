"""Compares what closed hops are thinned by, on the task where an early detail matters late.

Ghost Letters, dare-tiny-anole, attention scorer, training-free: hop_score x hop_budget x hop_decay
under each budget, on the same items; text is kept whole. A budget is a vision rate, with "/cap"
behind it where max_kv_tokens bounds a layer too. One JSON line per arm, then a table; its p is
the exact McNemar test against the first arm of the same budget and decay.

    python scripts/compare_hop_policies.py --n 500 --seed 0 --budgets 0.5,1.0/160
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.assets import model_path
from dare_hf.evaluation import compare_paired
from dare_hf.evaluation.costs import ReportTotals
from dare_hf.tasks import ghost, ghost_run, mvot

ARMS = list(itertools.product(("observed", "stored"), ("per_hop", "pooled"), (1.0, 0.7)))


def run(model: Any, processor: Any, items: list, config: DareConfig, batch_size: int) -> dict:
    """Accuracy, costs as shares of the unpruned run's, and which items were right."""
    totals = ReportTotals(model)
    apply_dare(model, config)
    try:
        solutions = ghost_run.solve(model, processor, items, batch_size, on_batch=totals)
    finally:
        remove_dare(model)
    score = mvot.score(solutions)
    return {
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": [round(bound, 4) for bound in score.accuracy_interval],
        "flops_ratio": round(totals.flops_ratios()["all"], 4),
        "kv_ratio": round(totals.kv_ratio, 4),
        "right": [s.correct for s in solutions],
    }


def main() -> None:
    """Runs all arms at all rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["train", "easy", "hard"], default="easy")
    parser.add_argument("--budgets", default="0.5,1.0/160", help="comma separated, rate[/cap]")
    parser.add_argument("--from_layer", type=int, default=0, help="layers before it stay whole")
    parser.add_argument("--arms", default="", help="numbers of arms to run (default: all)")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model or model_path("dare-tiny-anole")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    items = ghost.sample(args.n, args.split, args.seed)
    layers = model.config.num_hidden_layers
    chosen = [ARMS[int(k)] for k in args.arms.split(",")] if args.arms else ARMS
    rows = []
    for budget_text in args.budgets.split(","):
        rate_text, _, cap_text = budget_text.partition("/")
        rate, first = float(rate_text), {}
        for score, budget, decay in chosen:
            config = DareConfig(
                schedule=tuple((1.0 if k < args.from_layer else rate, 1.0) for k in range(layers)),
                hop_score=score,
                hop_budget=budget,
                hop_decay=decay,
                max_kv_tokens=int(cap_text) if cap_text else None,
                hop_delimiters=ghost_run.delimiters(processor),
            )
            result = run(model, processor, items, config, args.batch_size)
            right = result.pop("right")
            base = first.setdefault(decay, right)
            arm = {"vision": budget_text, "score": score, "budget": budget, "decay": decay}
            p_value = round(compare_paired(base, right).p_value, 5)
            rows.append({**arm, **result, "p_to_first": p_value})
            marks = "".join(str(int(one)) for one in right)
            line = rows[-1] | {"split": args.split, "seed": args.seed, "right": marks}
            print(json.dumps(line), flush=True)
    print("| vision | hop_score | hop_budget | hop_decay | right | FLOPs | KV | p to first |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["interval"]
        cells = (row["vision"], row["score"], row["budget"], row["decay"])
        right = f"{row['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
        costs = (f"x{row['flops_ratio']:.2f}", f"x{row['kv_ratio']:.2f}", row["p_to_first"])
        print("| " + " | ".join(map(str, (*cells, right, *costs))) + " |")


if __name__ == "__main__":
    main()
