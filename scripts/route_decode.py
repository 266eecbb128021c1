"""A shipped adapter with thresholds for routed decode: its generated tokens may skip layers.

python scripts/route_decode.py --model anole --adapter dare-lh --out runs/routed
dare-hf eval --adapter runs/routed --n 1000 --seed 7
"""

from __future__ import annotations

import argparse
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from claim import MODELS

from dare_hf.assets import adapter_path
from dare_hf.calibration import fit_thresholds
from dare_hf.demo.embedded import load_embedded
from dare_hf.evaluation import trained_arm
from dare_hf.generation.interleaved import allow_image_tokens
from dare_hf.recipes.data import TaskCollator, TaskStream

BATCH = 8


def main() -> None:
    """Fits on training solutions; writes the layout that `dare-hf train` writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--adapter", required=True, help="name of a shipped one, or a folder")
    parser.add_argument("--solutions", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_embedded(args.model)
    given = Path(args.adapter)
    source = given if given.is_dir() else adapter_path(f"dare-tiny-{args.model}", args.adapter)
    arm = trained_arm(args.adapter, source)
    routed = arm.on(model)
    stream = TaskStream(MODELS[args.model]["recipe"]["task"], args.solutions, args.seed)
    collate = TaskCollator(routed, processor)
    starts = range(0, args.solutions, BATCH)
    batches = [collate([stream[k] for k in range(s, s + BATCH)]) for s in starts]
    with allow_image_tokens(routed) if args.model == "anole" else nullcontext():
        fit_thresholds(routed, batches)
    routed.save_pretrained(args.out / "dare")
    if arm.lora is not None:
        shutil.copytree(arm.lora, args.out / "lora", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
