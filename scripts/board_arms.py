"""Stage 3 of dare-board: arms of pruning, on the model that train_board.py exported.

    python scripts/board_arms.py train --model runs/board/model --arm dare_lh --out runs/board
    python scripts/board_arms.py evaluate --model runs/board/model --arm dare_lh --out runs/board
    python scripts/board_arms.py evaluate --model runs/board/model --arm plain --out runs/board

`train` resumes by itself. `evaluate` appends one JSON line to arms.jsonl, with one digit an item.
Arms are those of claim_arms.py; besides, untrained: `plain` (nothing pruned) and `default` (what
`apply_dare(model, scorer="attention")` does at the same rates). The plan is in docs/log.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from claim_arms import ARMS, ONE_RATE
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint

from dare_hf import DareConfig
from dare_hf.evaluation import Arm, measure, trained_arm
from dare_hf.evaluation.measurement import setting
from dare_hf.evaluation.suite import TASKS
from dare_hf.recipes import Recipe, train
from dare_hf.tasks import board, board_run

VISION, TEXT = 0.4, 0.7
LORA = {"r": 2, "lora_alpha": 4}
STEPS, BATCH, SAVE_EVERY = 600, 16, 20
TASK = TASKS["board"]
UNTRAINED = {
    "plain": None,
    "default": DareConfig(vision_retention=VISION, text_retention=TEXT, scorer="attention"),
}


def dare_fields(args: argparse.Namespace) -> dict[str, Any] | None:
    """Fields of DareConfig of a trained arm."""
    fields = ARMS[args.arm]
    if fields is None:
        return None
    text, vision = TEXT, VISION
    if args.arm in ONE_RATE:  # the same number of tokens under one rate
        processor = AutoProcessor.from_pretrained(args.model)
        made = board_run.build_inputs(processor, board.sample(64, "train", 999))
        seen = (made["input_ids"] == processor.image_token_id).sum()
        share = float(seen / made["attention_mask"].sum())
        text = round(share * vision + (1 - share) * text, 4)
    return {"vision_retention": vision, "text_retention": text, "first_layers_whole": 2, **fields}


def run_training(args: argparse.Namespace, folder: Path) -> None:
    dare = dare_fields(args)
    recipe = Recipe(
        model=str(args.model),
        out=str(folder),
        task=("board",),
        dare=dare,
        lora=LORA,
        calibrate=args.calibrate if dare is not None and "scorer" not in dare else 0,
        rate_margin=0.1,
        steps=args.steps,
        batch_size=BATCH,
        learning_rate=5e-4,
        warmup=20,
        seed=args.seed,
        first=1_000_000,  # behind the boards of stage 2
        bf16=True,
        save_every=SAVE_EVERY,
    )
    done = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
    train(recipe, resume=done)


def run_evaluation(args: argparse.Namespace, folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    if args.arm in UNTRAINED:
        arm = Arm(args.arm, UNTRAINED[args.arm])
    elif (folder / "dare").is_dir():
        arm = trained_arm(args.arm, folder)
    else:
        fields = dare_fields(args)
        arm = Arm(args.arm, fields and DareConfig(**fields), lora=folder / "lora")
    items = board.sample(args.n, args.split)
    found = measure(model, processor, TASK, arm, items, batch_size=args.batch).to_dict()
    entry = {"arm": args.arm, "seed": args.seed, "split": args.split}
    line = json.dumps({**entry, **found, **setting(model)})
    print(line, flush=True)
    with (args.out / "arms.jsonl").open("a") as file:
        file.write(line + "\n")


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "evaluate"])
    parser.add_argument("--model", type=Path, required=True, help="of train_board.py")
    parser.add_argument("--arm", choices=[*ARMS, *UNTRAINED], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--calibrate", type=int, default=16, help="examples to fit routers on")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--split", choices=["easy", "hard"], default="easy")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.out / f"{args.arm}_{args.seed}"
    if args.command == "train":
        if args.arm in UNTRAINED:
            parser.error(f"--arm {args.arm} has nothing to train")
        run_training(args, folder)
    else:
        run_evaluation(args, folder)


if __name__ == "__main__":
    main()
