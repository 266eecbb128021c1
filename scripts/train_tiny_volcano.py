"""Trains dare-tiny-volcano from nothing, then exports it.

    python scripts/train_tiny_volcano.py --out runs/volcano          # resumes by itself
    python scripts/train_tiny_volcano.py --out runs/volcano --stage export --assets DIR

Everything is drawn from seeds.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch
import volcano_files
from volcano_lm import Plan, train


def export(out: Path, assets: Path) -> None:
    """Writes the model directory from the latest checkpoint."""
    saved = torch.load(out / "lm.pt")
    plan = Plan(**saved["plan"])
    sizes = (plan.layers, plan.hidden, plan.ffn, plan.heads, plan.tower_layers, plan.tower_hidden)
    model = volcano_files.build_model(*sizes)
    model.load_state_dict(saved["model"])
    volcano_files.export(model.eval(), assets)
    print(f"exported {saved['step'] * plan.batch} samples' model to {assets}")


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument("--stage", choices=["train", "export", "all"], default="all")
    parser.add_argument("--assets", type=Path, help="model directory to write (stage export)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast of matrix products")
    for field in fields(Plan):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})

    def log(entry: dict) -> None:
        print(entry, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    if args.stage in ("train", "all"):
        log({"event": "start", "torch": torch.__version__, "bf16": args.bf16, **vars(plan)})
        train(plan, args.out, args.bf16, log)
    if args.stage == "export" or (args.stage == "all" and args.assets):
        export(args.out, args.assets)


if __name__ == "__main__":
    main()
