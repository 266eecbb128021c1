"""Measures a model directory on a MAZE split by free-running generation; one JSON line on stdout.

python scripts/evaluate_tiny_anole.py --split easy --n 500 --seed 0
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf.tasks import maze, mvot


def by_length(solutions: list[mvot.Solution]) -> dict[str, list[float]]:
    """Number of actions -> [items, share answered right]."""
    groups: dict[int, list[bool]] = {}
    for solution in solutions:
        groups.setdefault(len(solution.item.actions), []).append(solution.correct)
    return {str(k): [len(v), round(sum(v) / len(v), 4)] for k, v in sorted(groups.items())}


def main() -> None:
    """Parses the command line, solves the items and prints the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--split", choices=["easy", "hard"], default="easy")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    if args.model is None:
        from dare_hf.assets import model_path

        args.model = model_path("dare-tiny-anole")
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    started = time.perf_counter()
    solutions = mvot.solve(
        model,
        processor,
        maze.sample(args.n, args.split, args.seed),
        args.batch_size,
        progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
    )
    result = {
        "split": args.split,
        "seed": args.seed,
        **asdict(mvot.score(solutions)),
        "by_length": by_length(solutions),
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
