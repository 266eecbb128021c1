"""The arms of the router comparison: the same steps, data, optimiser and LoRA for each.

    python scripts/claim.py train --model anole --arm dare_lh --budget paper --seed 0 --out runs
    python scripts/claim.py evaluate --model anole --arm dare_lh --budget paper --seed 0 --out runs
    python scripts/claim.py evaluate ... --change shuffled        (an intervention)
    python scripts/claim.py both --model volcano --arm no_hard    (a row of the ablation)
    python scripts/claim.py both ... --budget 0.3/0.8             (vision / text: a retention grid)
    python scripts/claim.py evaluate --model anole --arm plain --change markov

`evaluate` appends one JSON line a task and split to runs/results.jsonl, with one digit an item;
scripts/claim_report.py makes the tables. What is compared, and by which margins, is in docs/log.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from claim_arms import ARMS, ONE_RATE, ROWS
from safetensors.torch import load_file, save_file

from dare_hf import DareConfig, last_report
from dare_hf.calibration import fit_router
from dare_hf.demo.embedded import load_embedded, safe_config
from dare_hf.evaluation import Arm, measure, trained_arm
from dare_hf.evaluation.suite import TASKS, Task
from dare_hf.forward.modality import vision_token_ids
from dare_hf.generation.interleaved import allow_image_tokens
from dare_hf.recipes import Recipe, train
from dare_hf.recipes.data import TaskCollator, TaskStream
from dare_hf.routing.selection import isin_ids

FITTED = {"calibrated": "dare_lh", "calibrated_l": "dare_l"}
"""Arms that are fitted in closed form and not trained, and whose rates they have."""
MODELS: dict[str, dict[str, Any]] = {
    "anole": {
        "recipe": {
            "task": ("maze", "ghost"),
            "steps": 150,
            "batch_size": 8,
            "warmup": 15,
            "learning_rate": 5e-4,
            "router_lr": 1e-4,
            "rate_lr": 1e-2,
        },
        "dare": {"max_hops": 6},
        "budgets": {"paper": (0.4, 0.7), "lean": (0.25, 0.5), "matched": (0.21, 0.45)},
    },
    "volcano": {
        "recipe": {
            "task": ("scene",),
            "steps": 600,
            "batch_size": 32,
            "warmup": 30,
            "learning_rate": 1e-3,
            "router_lr": 1e-3,
            "rate_lr": 2e-2,
            "rate_margin": 0.1,
        },
        # 16 tokens a picture: under a sharper relaxation one flip of the selection is not unlearned
        "dare": {"max_hops": 4, "soft_temperature": 0.2},
        "budgets": {"paper": (0.4, 0.7), "lean": (0.3, 0.6), "matched": (0.28, 0.57)},
    },
}
CALIBRATE = 16
COST = "training_cost.json"
LORA = {"r": 16, "lora_alpha": 32}
SPLITS = ("easy", "hard")
CHANGES = ("shuffled", "swapped", "layer_rates")
MARKOV = "markov"


def delimiters(model: str, processor: Any) -> tuple[int, ...]:
    """What ends a hop in all tasks of a model; anole's separator does in both of its tasks."""
    return TASKS["ghost" if model == "anole" else "scene"].ends(processor)


def dare_fields(args: argparse.Namespace, processor: Any, share: float) -> dict[str, Any] | None:
    """Fields of DareConfig of an arm; `share` is the part of tokens that are vision."""
    fields = (ARMS | ROWS)[args.arm]
    if fields is None:
        return None
    vision, text = budget_of(args)
    if args.arm in ONE_RATE:  # the same number of tokens under one rate
        text = round(share * vision + (1 - share) * text, 4)
    return {
        "vision_retention": vision,
        "text_retention": text,
        "hop_delimiters": delimiters(args.model, processor),
        **MODELS[args.model]["dare"],
        **fields,
    }


def budget_of(args: argparse.Namespace) -> tuple[float, float]:
    """Mean retention of vision and text: of a budget's name, or as written ("0.3/0.8")."""
    named = MODELS[args.model]["budgets"]
    if args.budget in named:
        return named[args.budget]
    vision, text = map(float, args.budget.split("/"))
    return vision, text


def vision_share(name: str) -> float:
    """Share of vision among all tokens of 64 training solutions."""
    model, processor = load_embedded(name)
    tasks = MODELS[name]["recipe"]["task"]
    stream = TaskStream(tasks, 64, 999)
    made = TaskCollator(model, processor)([stream[k] for k in range(64)])
    vision = isin_ids(made["input_ids"], vision_token_ids(model.config))
    return float(vision.sum() / made["attention_mask"].sum())


def folder(args: argparse.Namespace) -> Path:
    """Where an arm's adapters are."""
    budget = "full" if args.arm == "full" else args.budget.replace("/", "_")
    return Path(args.out) / f"{args.model}_{label(args)}_{budget}_{args.seed}"


def label(args: argparse.Namespace) -> str:
    """An arm's name in files and results; what is tried beside the arms has one of its own."""
    alone = ["router_only"] if args.router_only else []
    tried = [f"{field}_{value:g}" for field, value in trial(args).items()]
    return "_".join([args.arm, *alone, *tried])


def run_training(args: argparse.Namespace) -> None:
    """Train one arm."""
    _, processor = load_embedded(args.model)
    share = vision_share(args.model) if args.arm in ONE_RATE else 0.0
    recipe = Recipe(
        model=args.model,
        out=str(folder(args)),
        dare=dare_fields(args, processor, share),
        lora=None if args.router_only else LORA,
        seed=args.seed,
        calibrate=CALIBRATE,
        **(MODELS[args.model]["recipe"] | trial(args)),
    )
    start = time.perf_counter()
    train(recipe)
    cost = {"seconds": time.perf_counter() - start, "steps": recipe.steps}
    (folder(args) / COST).write_text(json.dumps(cost))


def trial(args: argparse.Namespace) -> dict[str, Any]:
    """What a trial asks of the recipe in place of the arms' common fields."""
    names = ("steps", "learning_rate", "router_lr", "validate", "save_every", "equal_rates")
    asked = {name: getattr(args, name) for name in names}
    return {name: value for name, value in asked.items() if value is not None}


def changed(args: argparse.Namespace, source: Path, target: Path) -> Path:
    """A copy of a router adapter with an intervention.

    "shuffled" ranks the tokens of each layer by chance and keeps its rates; "swapped" reverses the
    order of the hops' rates; "layer_rates" takes the rates DARE-L learned, for every hop.
    """
    shutil.copytree(source, target)
    settings = json.loads((target / "adapter_config.json").read_text())
    path = target / "adapter_model.safetensors"
    tensors = load_file(path)
    rates = {name: value for name, value in tensors.items() if name.endswith("rate_logits")}
    if args.change == "shuffled":
        settings["scorer"] = "random"
    if args.change == "swapped":
        for name, value in rates.items():  # row 1 serves no hop
            order = [len(value) - 1, 1, *range(len(value) - 2, 1, -1), 0]
            tensors[name] = value[order].contiguous()
    if args.change == "layer_rates":
        other = argparse.Namespace(**{**vars(args), "arm": "dare_l"})
        learned = load_file(folder(other) / "dare" / "adapter_model.safetensors")
        for name, value in rates.items():
            tensors[name] = learned[name].expand_as(value).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


def arm_of(args: argparse.Namespace, model: Any, processor: Any, scratch: Path) -> Arm:
    """What is put on the plain model."""
    ends = delimiters(args.model, processor)
    if args.arm == "safe":
        return Arm("safe", replace(safe_config(processor, args.model), hop_delimiters=ends))
    if args.arm in FITTED:
        return trained_arm(args.arm, calibrated(args, model, processor, scratch / "fit"))
    where = folder(args)
    lora = None if args.router_only else where / "lora"
    if args.arm in (
        "full",
        "plain",
    ):  # everything is kept, in a cache that does not copy itself each step
        keep = DareConfig(
            vision_retention=1.0, text_retention=1.0, schedule="constant", hop_delimiters=ends
        )
        return Arm(args.arm, keep, lora=lora if args.arm == "full" else None)
    routers = where / "dare"
    if not routers.exists():
        return Arm(args.arm, DareConfig(**dare_fields(args, processor, 0.0) or {}), lora=lora)
    if args.change in CHANGES:
        routers = changed(args, routers, scratch / "dare")
    return trained_arm(args.arm, routers, lora=lora)


def calibrated(args: argparse.Namespace, model: Any, processor: Any, target: Path) -> Path:
    """Routers fitted in closed form on 32 training solutions, saved in `target`."""
    like = argparse.Namespace(**{**vars(args), "arm": FITTED[args.arm]})
    fields = dare_fields(like, processor, 0.0)
    config = DareConfig(scorer="router", schedule="learned", **(fields or {}))
    stream = TaskStream(MODELS[args.model]["recipe"]["task"], 32, args.seed)
    fitted = copy.deepcopy(model)
    collate = TaskCollator(fitted, processor)
    rows = [[stream[k] for k in range(first, first + 8)] for first in range(0, 32, 8)]
    with allow_image_tokens(fitted) if args.model == "anole" else nullcontext():
        fit_router(fitted, [collate(one) for one in rows], config).save_pretrained(target)
    return target


def run_evaluation(args: argparse.Namespace) -> None:
    """Solve the held-out items of each task and split; one JSON line each."""
    model, processor = load_embedded(args.model)
    names = args.tasks.split(",") if args.tasks else MODELS[args.model]["recipe"]["task"]
    with tempfile.TemporaryDirectory() as scratch:
        arm = arm_of(args, model, processor, Path(scratch))
        for name, split in itertools.product(names, args.splits.split(",")):
            items = TASKS[name].sample(args.n, split, args.items_seed)
            size = args.batch_size
            task, costs = watched(TASKS[name], MARKOV if args.change == MARKOV else None)
            result = measure(model, processor, task, arm, items, batch_size=size)
            asked = ("model", "change", "budget", "seed", "items_seed")
            line = {
                "arm": label(args),
                **{field: getattr(args, field) for field in asked},
                "task": name,
                "split": split,
                **result.to_dict(),
                **{what: sum(by_item.values()) / len(items) for what, by_item in costs.items()},
                "training": training_cost(args),
            }
            with (Path(args.out) / "results.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown = {k: v for k, v in line.items() if k not in ("right", "retention")}
            print(json.dumps(shown), file=sys.stderr, flush=True)


def watched(task: Task, context: str | None) -> tuple[Task, dict[str, dict[int, float]]]:
    """A task that notes what each item costs, in a context that may be another.

    Returns:
        The task, and by item "kv_bytes", the largest cache of its generate calls, and "flops", of
        all of them. A step of "markov" is a call of its own.
    """
    costs: dict[str, dict[int, float]] = {"kv_bytes": {}, "flops": {}}

    def note(model: Any, batch: Any) -> None:
        report, rows = last_report(model), len(batch.indices)
        for item in batch.indices:
            held, run = costs["kv_bytes"], costs["flops"]
            held[item] = max(held.get(item, 0.0), report.kv_bytes / rows)
            run[item] = run.get(item, 0.0) + sum(report.flops.values()) / rows

    def solve(model: Any, *given: Any, on_batch: Any = None, **options: Any) -> list[Any]:
        def both(batch: Any) -> None:
            note(model, batch)
            on_batch(batch)

        for by_item in costs.values():
            by_item.clear()  # of the items that warmed up
        more = {} if context is None else {"context": context}
        return task.solve(model, *given, on_batch=on_batch and both, **more, **options)

    return replace(task, solve=solve), costs


def training_cost(args: argparse.Namespace) -> dict[str, float] | None:
    """Seconds and steps of an arm's training; None where it has none."""
    file = folder(args) / COST
    return json.loads(file.read_text()) if file.exists() else None


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "evaluate", "both"])
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--arm", required=True, choices=[*ARMS, *ROWS, "plain", "safe", *FITTED])
    parser.add_argument("--budget", default="paper", help="paper, lean, matched, or VISION/TEXT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs")
    parser.add_argument("--steps", type=int, help="another number of steps, for a trial")
    parser.add_argument("--learning_rate", type=float, help="another one of the LoRA, for a trial")
    parser.add_argument("--router_lr", type=float, help="another one of the routers, for a trial")
    parser.add_argument("--validate", type=int, help="rows held out, for a trial")
    parser.add_argument("--save_every", type=int, help="steps between checkpoints, for a trial")
    parser.add_argument(
        "--equal_rates", action="store_true", default=None, help="rates start equal"
    )
    parser.add_argument("--router_only", action="store_true", help="no LoRA: a frozen backbone")
    parser.add_argument("--change", choices=[*CHANGES, MARKOV], help="an intervention, a context")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--splits", default=",".join(SPLITS))
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--items_seed", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.change == MARKOV and args.model != "anole":
        parser.error("--change markov: only dare-tiny-anole has that context")
    if args.command != "evaluate":
        run_training(args)
    if args.command != "train":
        run_evaluation(args)


if __name__ == "__main__":
    main()
