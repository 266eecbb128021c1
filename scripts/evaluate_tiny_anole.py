"""What `dare-hf eval` leaves out of dare-tiny-anole: other contexts, length, unfinished weights.

python scripts/evaluate_tiny_anole.py --task maze --context markov --split easy --n 500 --seed 0
python scripts/evaluate_tiny_anole.py --task ghost --model runs/anole --failures 5

Free-running generation without pruning; one JSON line on stdout.
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
from transformers import AutoModelForImageTextToText, AutoProcessor

from dare_hf.assets import model_path
from dare_hf.tasks import frozen_lake, ghost, ghost_run, maze, mvot

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
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.model or model_path("dare-tiny-anole")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    started = time.perf_counter()
    task, solve = TASKS[args.task]
    solutions = solve(
        model,
        processor,
        task.sample(args.n, args.split, args.seed),
        args.batch_size,
        context=args.context,
        progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
    )
    score = asdict(mvot.score(solutions))
    result = {
        "task": args.task,
        "context": args.context,
        "split": args.split,
        "seed": args.seed,
        **{k: v for k, v in score.items() if not (isinstance(v, float) and math.isnan(v))},
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
