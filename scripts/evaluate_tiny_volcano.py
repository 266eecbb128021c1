"""What `dare-hf eval` leaves out of dare-tiny-volcano: no second look, relations, other weights.

python scripts/evaluate_tiny_volcano.py --no_refocus --split easy --n 500 --seed 0
python scripts/evaluate_tiny_volcano.py --model runs/volcano --failures 5

Free-running generation without pruning; one JSON line on stdout.
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

from dare_hf.assets import model_path
from dare_hf.tasks import scene, vocot


def by_relations(solutions: list[vocot.Solution]) -> dict[str, list[float]]:
    """Number of relations -> [items, share answered right]."""
    groups: dict[int, list[bool]] = {}
    for solution in solutions:
        groups.setdefault(len(solution.item.relations), []).append(solution.correct)
    return {str(k): [len(v), round(sum(v) / len(v), 4)] for k, v in sorted(groups.items())}


def main() -> None:
    """Parses the command line, solves the items and prints the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="model directory (default: the embedded one)")
    parser.add_argument("--split", choices=["train", "easy", "hard"], default="easy")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--no_refocus", action="store_true", help="no second look at the boxes")
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.model or model_path("dare-tiny-volcano")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    started = time.perf_counter()
    solutions = vocot.solve(
        model,
        processor,
        scene.sample(args.n, args.split, args.seed),
        args.batch_size,
        refocus=not args.no_refocus,
        progress=lambda done, total: print(f"{done}/{total}", file=sys.stderr),
    )
    result = {
        "split": args.split,
        "seed": args.seed,
        "refocus": not args.no_refocus,
        **asdict(vocot.score(solutions)),
        "by_relations": by_relations(solutions),
        "seconds": round(time.perf_counter() - started, 1),
        "dtype": str(model.dtype),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    wrong = [s for s in solutions if not s.correct or not all(s.box_correct)]
    for solution in wrong[: args.failures]:
        print(solution.item.answer, solution.item.prompt, repr(solution.text), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
