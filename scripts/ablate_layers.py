"""Which layers of an embedded model can do without old tokens: one layer pruned at a time.

Runs on training items only, so that the schedule read off this table can be judged on held-out
ones. `--schedule` runs one whole schedule instead, one rate per layer.

    python scripts/ablate_layers.py --model anole --n 48 --seed 77
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import torch

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.demo.embedded import RUNNERS, load_runner
from dare_hf.evaluation.costs import ReportTotals

if TYPE_CHECKING:
    from dare_hf.demo.runner import Runner


def run(
    runner: Runner, items: list[Any], rates: list[float], modality: str, decay: float
) -> dict[str, float]:
    """Solve `items` with one rate per layer for one modality; the other is kept whole."""
    pairs = ((rate, 1.0) if modality == "vision" else (1.0, rate) for rate in rates)
    config = DareConfig(
        schedule=tuple(pairs),
        uniform_share=0.25,
        hop_decay=decay,
        hop_delimiters=runner.delimiters(runner.processor),
    )
    totals = ReportTotals(runner.model)
    apply_dare(runner.model, config)
    try:
        score = runner.score(runner.solve(items, batch_size=48, on_batch=totals))
    finally:
        remove_dare(runner.model)
    return {
        "accuracy": round(score.accuracy, 4),
        runner.detail: round(runner.detail_share(score), 4),
        "flops": round(totals.flops_ratios()["all"], 4),
        "kv": round(totals.kv_ratio, 4),
    }


def main() -> None:
    """Print one JSON line per schedule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RUNNERS), default="anole")
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--modality", choices=["vision", "text"], default="vision")
    parser.add_argument("--rates", default="0.25,0.04", help="rates tried in one layer")
    parser.add_argument("--schedule", help="one rate per layer, comma separated")
    parser.add_argument("--hop_decay", type=float, default=1.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runner = load_runner(arguments.model)
    items = runner.sample(arguments.n, "train", arguments.seed)
    layers = runner.model.config.get_text_config().num_hidden_layers
    if arguments.schedule:
        schedules = [[float(rate) for rate in arguments.schedule.split(",")]]
    else:
        rates = [float(rate) for rate in arguments.rates.split(",")]
        schedules = [
            [rate if k == layer else 1.0 for k in range(layers)]
            for rate in rates
            for layer in range(layers)
        ]
    for rates in schedules:
        line = run(runner, items, rates, arguments.modality, arguments.hop_decay)
        line |= {"n": len(items), "hop_decay": arguments.hop_decay}
        print(json.dumps({arguments.modality: rates, **line}), flush=True)


if __name__ == "__main__":
    main()
