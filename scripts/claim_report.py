"""Tables of the router comparison, from what scripts/claim.py wrote.

    python scripts/claim_report.py runs --model anole --budget paper
    python scripts/claim_report.py runs --model anole --budget paper --seeds
    python scripts/claim_report.py runs --model anole --budget paper --learned
    python scripts/claim_report.py docs/results --model volcano --pair dare_l dare_lh@1
    python scripts/claim_report.py runs --model volcano --base dare_lh_equal_rates_1 [--learned]

The first compares the arms on the same items, the second shows every seed, the third what each arm
learned, the fourth two lines of the results, by arm and seed.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file

from dare_hf.evaluation import compare_paired
from dare_hf.evaluation.intervals import wilson
from dare_hf.routing.retention import resolve_cut_layer

if TYPE_CHECKING:
    from collections.abc import Iterable

RATES = re.compile(r".*layers\.(\d+)\..*rate_logits").match
ORDER = ("full", "random", "symmetric", "constant", "dare_l", "dare_lh")


def read(folder: Path) -> dict[tuple, dict[str, Any]]:
    """The last line of each (model, arm, change, budget, seed, task, split) in a folder's files."""
    found = {}
    texts = [path.read_text() for path in sorted(folder.glob("*.jsonl"))]
    for text in "".join(texts).splitlines():
        line = json.loads(text)
        budget = "full" if line["arm"].startswith("full") else line["budget"]
        names = (line["model"], line["arm"], line["change"], budget, line["seed"])
        found[(*names, line["task"], line["split"])] = line
    return found


def right(line: dict[str, Any]) -> np.ndarray:
    """Bool[n] of the items."""
    return np.array([mark == "1" for mark in line["right"]])


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}"


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder that claim.py wrote")
    parser.add_argument("--model", required=True)
    parser.add_argument("--budget", default="paper")
    parser.add_argument("--seed", type=int, default=0)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--seeds", action="store_true", help="every seed, and their means")
    kind.add_argument("--learned", action="store_true", help="rates by hop, layer and modality")
    parser.add_argument("--base", default="dare_lh", help="the arm that others are held against")
    kind.add_argument("--pair", nargs=2, metavar="ARM[@SEED]", help="the second against the first")
    args = parser.parse_args()
    if args.pair:
        show_pair(args)
        return
    show = show_learned if args.learned else show_seeds if args.seeds else show_results
    show(args)


def show_seeds(args: argparse.Namespace) -> None:
    """Accuracy (and KV) of each seed in per cent: one table a task and split."""
    found: dict[tuple, dict[str, dict[int, dict[str, Any]]]] = {}
    for key, line in read(args.runs).items():
        model, arm, change, budget, seed, *where = key
        if model == args.model and budget in (args.budget, "full") and change is None:
            found.setdefault(tuple(where), {}).setdefault(arm, {})[seed] = line
    for (task, split), arms in sorted(found.items()):
        seeds = sorted({seed for lines in arms.values() for seed in lines})
        print(f"\n{args.model}, {task}, {split}, budget {args.budget}: right % (KV %)\n")
        print("| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |")
        print("|---" * (len(seeds) + 2) + "|")
        for arm, lines in sorted(arms.items(), key=lambda item: _rank(item[0])):
            cells = [_right_and_kv([lines[seed]]) if seed in lines else "" for seed in seeds]
            print(f"| {arm} | " + " | ".join((*cells, _right_and_kv(list(lines.values())))) + " |")


def _right_and_kv(lines: list[dict[str, Any]]) -> str:
    kv = np.mean([line["kv_ratio"] for line in lines])
    return f"{share(np.mean([right(line).mean() for line in lines]))} ({share(kv)})"


def _rank(arm: str) -> int:
    return ORDER.index(arm) if arm in ORDER else len(ORDER)


def show_learned(args: argparse.Namespace) -> None:
    """Learned rates in per cent: one table an arm and modality, a line a row of the rate table."""
    for arm in dict.fromkeys(("dare_l", "dare_lh", args.base)):
        folder = args.runs / f"{args.model}_{arm}_{args.budget}_{args.seed}" / "dare"
        if not folder.exists():
            continue
        tensors = load_file(folder / "adapter_model.safetensors")
        found = {int(layer[1]): value for name, value in tensors.items() if (layer := RATES(name))}
        rates = torch.stack([found[layer] for layer in sorted(found)]).sigmoid()  # [layer, row, 2]
        for kind, name in enumerate(("text", "vision")):
            print(f"\n{args.model}, {arm}, budget {args.budget}, seed {args.seed}: {name}\n")
            print("| hop | " + " | ".join(map(str, sorted(found))) + " | mean |")
            print("|---" * (len(found) + 2) + "|")
            for row in (row for row in range(rates.shape[1]) if row != 1):  # row 1 serves no hop
                hop = "all" if rates.shape[1] == 1 else ("0, 1" if row == 0 else str(row))
                values = [*rates[:, row, kind].tolist(), rates[:, row, kind].mean().item()]
                print(f"| {hop} | " + " | ".join(f"{100 * rate:.0f}" for rate in values) + " |")
            settings = json.loads((folder / "adapter_config.json").read_text())
            cut = resolve_cut_layer(settings["cut_layer"], len(found))
            used = [row for row in range(rates.shape[1]) if row != 1]
            halves = (rates[: cut + 1, used, kind].mean(), rates[cut + 1 :, used, kind].mean())
            print("\nup to layer {}: {:.1f} %, behind it: {:.1f} %".format(cut, *percent(halves)))


def show_results(args: argparse.Namespace) -> None:
    """One table a task and split."""
    lines = read(args.runs)
    mine = {
        key[1:3] + key[5:]: line
        for key, line in lines.items()
        if key[0] == args.model and key[3] in (args.budget, "full") and key[4] == args.seed
    }
    for task, split in sorted({key[2:] for key in mine}):
        print(f"\n{args.model}, {task}, {split}, budget {args.budget}, seed {args.seed}\n")
        names = ("arm", "right % (95 %), n", "KV %", "FLOPs %", "prefill FLOPs %", "against full")
        names = (*names, f"against {args.base}", "training, h")
        print("| " + " | ".join(names) + " |")
        print("|---" * len(names) + "|")
        rows = {key[:2]: line for key, line in mine.items() if key[2:] == (task, split)}
        full, best = rows.get(("full", None)), rows.get((args.base, None))
        for (arm, change), line in sorted(
            rows.items(), key=lambda kv: (_rank(kv[0][0]), kv[0][0], kv[0][1] or "")
        ):
            marks = right(line)
            low, high = wilson(float(marks.mean()), len(marks))
            cells = [
                f"{arm} {change or ''}".strip(),
                f"{share(marks.mean())} ({share(low)}-{share(high)}), {len(marks)}",
                *costs(line, full),
                against(full, line),
                against(best, line) if line is not best else "",
                hours(line),
            ]
            print("| " + " | ".join(cells) + " |")


def costs(line: dict[str, Any], full: dict[str, Any] | None) -> tuple[str, str, str]:
    """Shares of KV, FLOPs and prefill FLOPs.

    Of the same tokens unpruned; for another context than the whole chain, whose tokens are others,
    of what full needs for the item.
    """
    if line["change"] != "markov":
        phases = (share(line["flops_ratio"][phase]) for phase in ("all", "prefill"))
        return (share(line["kv_ratio"]), *phases)
    if full is None or "kv_bytes" not in full:
        return ("", "", "")
    return (*(share(line[what] / full[what]) for what in ("kv_bytes", "flops")), "")


def hours(line: dict[str, Any]) -> str:
    """Of the training."""
    cost = line.get("training")
    return "" if cost is None else f"{cost['seconds'] / 3600:.2f}"


def percent(values: Iterable[Any]) -> list[float]:
    """Shares in per cent."""
    return [100 * float(value) for value in values]


def show_pair(args: argparse.Namespace) -> None:
    """One line a task and split: the second arm against the first, on the same items."""
    lines = read(args.runs)
    found: list[dict[tuple, dict[str, Any]]] = []
    for name in args.pair:
        arm, _, seed = name.partition("@")
        budget = "full" if arm.startswith("full") else args.budget
        wanted = (args.model, arm, None, budget, int(seed or args.seed))
        found.append({key[5:]: line for key, line in lines.items() if key[:5] == wanted})
        if not found[-1]:
            raise SystemExit(f"{name}: no such line of {args.model}, budget {args.budget}")
    base, mine = found
    for place in sorted(set(base) & set(mine)):
        print(*place, against(base[place], mine[place]))


def against(base: dict[str, Any] | None, line: dict[str, Any]) -> str:
    """Difference to `base` in points, its interval, p, and whether it is not inferior.

    Over the items that both have: of two samples of one seed the shorter is the longer's beginning.
    """
    if base is None or base is line:
        return ""
    if base["items_seed"] != line["items_seed"]:
        return "other items"
    left, mine = right(base), right(line)
    common = min(len(left), len(mine))
    found = compare_paired(left[:common], mine[:common], margin=0.02)
    low, high = found.interval
    verdict = ", not inferior" if found.not_inferior else ""
    spread = f"({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * found.difference:+.1f} {spread}, p {found.p_value:.2g}{verdict}"


if __name__ == "__main__":
    main()
