"""Tables of the router comparison, from the lines that scripts/claim.py wrote.

python scripts/claim_report.py runs/results.jsonl --model anole --budget paper
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from dare_hf.evaluation import compare_paired
from dare_hf.tasks.mvot import wilson

ORDER = ("full", "random", "symmetric", "constant", "dare_l", "dare_lh")


def read(path: Path) -> dict[tuple, dict[str, Any]]:
    """The last line of each (model, arm, change, budget, seed, task, split)."""
    found = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        budget = "full" if line["arm"] == "full" else line["budget"]
        names = (line["model"], line["arm"], line["change"], budget, line["seed"])
        found[(*names, line["task"], line["split"])] = line
    return found


def right(line: dict[str, Any]) -> np.ndarray:
    """Bool[n] of the items."""
    return np.array([mark == "1" for mark in line["right"]])


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def main() -> None:
    """Print one table a task and split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", default="paper")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = read(args.results)
    mine = {
        key[1:3] + key[5:]: line
        for key, line in lines.items()
        if key[0] == args.model and key[3] in (args.budget, "full") and key[4] == args.seed
    }
    for task, split in sorted({key[2:] for key in mine}):
        print(f"\n{args.model}, {task}, {split}, budget {args.budget}, seed {args.seed}\n")
        names = ("arm", "right % (95 %)", "KV %", "FLOPs %", "prefill FLOPs %", "against full")
        print("| " + " | ".join((*names, "against DARE-LH")) + " |")
        print("|---|---|---|---|---|---|---|")
        rows = {key[:2]: line for key, line in mine.items() if key[2:] == (task, split)}
        full, best = rows.get(("full", None)), rows.get(("dare_lh", None))
        rank = {name: place for place, name in enumerate(ORDER)}
        for (arm, change), line in sorted(
            rows.items(), key=lambda kv: (rank.get(kv[0][0], 9), kv[0][0], kv[0][1] or "")
        ):
            marks = right(line)
            low, high = wilson(float(marks.mean()), len(marks))
            cells = [
                f"{arm} {change or ''}".strip(),
                f"{share(marks.mean())} ({share(low)}-{share(high)})",
                share(line["kv_ratio"]),
                *(share(line["flops_ratio"][phase]) for phase in ("all", "prefill")),
                against(full, line),
                against(best, line) if line is not best else "",
            ]
            print("| " + " | ".join(cells) + " |")


def against(base: dict[str, Any] | None, line: dict[str, Any]) -> str:
    """Difference to `base` in points, its interval, p, and whether it is not inferior."""
    if base is None or base is line:
        return ""
    found = compare_paired(right(base), right(line), margin=0.02)
    low, high = found.interval
    verdict = ", not inferior" if found.not_inferior else ""
    spread = f"({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * found.difference:+.1f} {spread}, p {found.p_value:.2g}{verdict}"


if __name__ == "__main__":
    main()
