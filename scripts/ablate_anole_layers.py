"""Which layers of dare-tiny-anole can do without old vision tokens: one layer pruned at a time.

Runs on training mazes only, so that the schedule read off this table can be judged on held-out
ones. `--vision` runs one whole schedule instead, one rate per layer.

    python scripts/ablate_anole_layers.py --n 48 --seed 77
"""

from __future__ import annotations

import argparse
import json

import torch

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.demo.embedded import load_embedded
from dare_hf.tasks import maze, mvot


def run(model, processor, items, vision: list[float]) -> mvot.Score:
    """Solve `items` with one vision rate per layer; text is kept whole."""
    config = DareConfig(
        schedule=tuple((rate, 1.0) for rate in vision),
        uniform_share=0.25,
        hop_delimiters=(processor.image_end_token_id,),
    )
    apply_dare(model, config)
    try:
        return mvot.score(mvot.solve(model, processor, items, batch_size=48))
    finally:
        remove_dare(model)


def main() -> None:
    """Print one JSON line per schedule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--rates", default="0.25,0.04", help="rates tried in one layer")
    parser.add_argument("--vision", help="one rate per layer, comma separated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_embedded("anole")
    items = maze.sample(arguments.n, "train", seed=arguments.seed)
    layers = model.config.num_hidden_layers
    if arguments.vision:
        schedules = [[float(rate) for rate in arguments.vision.split(",")]]
    else:
        rates = [float(rate) for rate in arguments.rates.split(",")]
        schedules = [
            [rate if k == layer else 1.0 for k in range(layers)]
            for rate in rates
            for layer in range(layers)
        ]
    for vision in schedules:
        score = run(model, processor, items, vision)
        line = {"vision": vision, "accuracy": score.accuracy, "images_right": score.images_right}
        print(json.dumps({**line, "n": score.n, "images": score.images}), flush=True)


if __name__ == "__main__":
    main()
