"""Trains dare-tiny-anole from nothing: VQ tokens, then interleaved text and images, then export.

    python scripts/train_tiny_anole.py --out runs/anole          # VQ and LM; resumes by itself
    python scripts/train_tiny_anole.py --out runs/anole --stage export --assets DIR

Everything is drawn from seeds. On a shared machine set OMP_WAIT_POLICY=PASSIVE: two jobs of two
spinning OpenMP threads each on two cores ran at a sixth of their speed. ANOLE_COMPILE=1 compiles
the layers, which needs a C++ compiler.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import anole_files
import numpy as np
import torch
from anole_lm import Plan, train_lm
from anole_vq import CODES, VQ_CONFIG, adapt_vq, pixels_of, train_vq
from transformers import AutoModelForImageTextToText

from dare_hf.generation.interleaved import load_decoder
from dare_hf.generation.vq_decoder import VQPatchDecoder
from dare_hf.tasks import frozen_lake, maze, render

VQ_STEPS = 1400
ADAPT_STEPS = 1500


@torch.no_grad()
def codes_of_types(vq: torch.nn.Module, check: int = 400) -> np.ndarray:
    """VQ code of every cell type, measured on training states through the rounded encoder.

    Raises:
        RuntimeError: Some cell type does not always get the same code.
    """
    items = [
        *maze.sample(check, "train", seed=2000),
        *frozen_lake.sample(check, "train", seed=2000),
    ]
    states = np.concatenate([item.grids() for item in items])
    drawn = np.arange(maze.NUM_CELL_TYPES)
    rows = np.random.default_rng(0).permuted(np.tile(drawn, (49, 1)), axis=1)
    states = np.concatenate([states, rows.T.reshape(-1, maze.FIELD, maze.FIELD)])
    votes = np.zeros((maze.NUM_CELL_TYPES, CODES), dtype=np.int64)
    for part in np.array_split(states, max(len(states) // 64, 1)):
        ids = vq.encode(pixels_of(part)).image_tokens.numpy()
        np.add.at(votes, (part.ravel(), ids), 1)
    codes = votes.argmax(1)
    stray = votes.sum() - votes.max(1).sum()
    print(f"cells encoded: {votes.sum()}, with another code than their type's: {stray}", flush=True)
    if len(set(codes)) != len(codes) or stray > 1e-3 * votes.sum():
        raise RuntimeError("expected one VQ code per cell type: train the VQ longer")
    return codes


def rounded(state: dict) -> dict:
    """What the shipped float16 file gives back."""
    return {name: value.half().float() for name, value in state.items()}


def load_vq(out: Path) -> tuple[dict, np.ndarray]:
    """The float16-rounded VQ state and the code of every cell type."""
    state = rounded(torch.load(out / "vq.pt")["vq"])
    model = anole_files.build_model(1, 32, 32, 1)
    model.model.vqmodel.load_state_dict(state)
    return state, codes_of_types(model.model.vqmodel)


def export(out: Path, assets: Path) -> None:
    """Writes the model directory from the latest checkpoint."""
    saved = torch.load(out / "lm.pt")
    plan = Plan(**saved["plan"])
    model = anole_files.build_model(plan.layers, plan.hidden, plan.ffn, plan.heads)
    model.load_state_dict(saved["model"])
    vq = torch.load(out / "vq.pt")
    model.model.vqmodel.load_state_dict(vq["vq"])
    decoder = VQPatchDecoder(VQ_CONFIG["embed_dim"], hidden=256, patch=render.PATCH)
    decoder.load_state_dict(vq["decoder"])
    anole_files.export(model.eval(), decoder, assets)
    print(f"exported {saved['seen']} samples' model to {assets}")


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and log.jsonl")
    parser.add_argument("--stage", choices=["vq", "lm", "export", "all"], default="all")
    parser.add_argument("--assets", type=Path, help="model directory to write (stage export)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast of matrix products")
    parser.add_argument("--begin", type=Path, help="model directory to go on from")
    for field in fields(Plan):
        kind = type(field.default)
        how = {"action": "store_true"} if kind is bool else {"type": kind, "default": field.default}
        parser.add_argument(f"--{field.name}", **how)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})

    old = AutoModelForImageTextToText.from_pretrained(args.begin) if args.begin else None

    def log(entry: dict) -> None:
        print(entry, flush=True)
        with (args.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    if args.stage in ("vq", "all") and not (args.out / "vq.pt").exists():
        if args.begin:
            vq, decoder = old.model.vqmodel.train(), load_decoder(old).requires_grad_(True)
            adapt_vq(vq, decoder, ADAPT_STEPS, args.out, plan.seed, log)
        else:
            train_vq(VQ_STEPS, args.out, plan.seed, log)
    if args.stage in ("lm", "all"):
        state, codes = load_vq(args.out)
        log({"stage": "start", "torch": torch.__version__, "bf16": args.bf16, **vars(plan)})
        train_lm(plan, state, codes, args.out, args.bf16, log, old and old.state_dict())
    if args.stage == "export" or (args.stage == "all" and args.assets):
        export(args.out, args.assets)


if __name__ == "__main__":
    main()
