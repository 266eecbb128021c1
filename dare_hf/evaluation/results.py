"""Tables from files of results, one JSON object a line, item by item, so that anyone adds rows.

`COLUMNS` is the schema. Further keys are let be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareInputError
from dare_hf.evaluation.intervals import wilson
from dare_hf.evaluation.paired import compare_paired

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

PHASES = ("all", "prefill", "decode")
BASE = "full"  # the arm that others are held against

Result = Mapping[str, Any]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


COLUMNS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("the model's name", _text),
    "task": ("what it was asked", _text),
    "split": ("which items of it", _text),
    "arm": (f'what was run; "{BASE}" prunes nothing and is what others are held against', _text),
    "change": (
        "what was done to the arm after its training, or null",
        lambda v: v is None or _text(v),
    ),
    "budget": ("which budget it was trained for", _text),
    "seed": ("of the training", _count),
    "items_seed": ("of the items; runs of one seed have the same items, in the same order", _count),
    "n": ("items", lambda v: _count(v) and v > 0),
    "accuracy": ("share right", _share),
    "right": (
        "a 1 or 0 for each item, in order",
        lambda v: isinstance(v, str) and set(v) <= set("01"),
    ),
    "kv_ratio": (
        "KV bytes at the end as a share of the same tokens' unpruned, or null where nothing is "
        "pruned",
        lambda v: v is None or _share(v),
    ),
    "flops_ratio": (
        f"FLOPs likewise, by {', '.join(PHASES)}, or null",
        lambda v: v is None or (isinstance(v, dict) and all(_share(v.get(p)) for p in PHASES)),
    ),
}


def read_results(file: Path) -> list[Result]:
    """The lines of a file of results; of several of one run the last.

    Raises:
        DareInputError: A line is not of the schema, or its accuracy is not that of its items; the
            text has file and line.
    """
    found: dict[tuple[Any, ...], Result] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DareInputError(f"results: expected JSON lines; got {file}: {error!s:.200}") from error
    for number, line in enumerate(lines, 1):
        place = f"results: {file.name}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DareInputError(f"{place}: expected a JSON object; got {line[:80]!r}") from error
        _check(value, place)
        names = ("model", "task", "split", "arm", "change", "budget", "seed")
        found[tuple(value[name] for name in names)] = value
    return list(found.values())


def _check(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise DareInputError(f"{place}: expected a JSON object; got {value!r:.80}")
    for name, (meaning, good) in COLUMNS.items():
        if name not in value or not good(value[name]):
            raise DareInputError(
                f"{place}: {name}: expected {meaning}; got {value.get(name)!r:.80}"
            )
    right = value["right"]
    if len(right) != value["n"] or abs(right.count("1") / len(right) - value["accuracy"]) > 1e-6:
        raise DareInputError(
            f"{place}: accuracy: expected that of its items, {right.count('1')} of {len(right)} "
            f"right; got {value['accuracy']}, n = {value['n']}"
        )


def results_page(folder: Path, model: str | None = None) -> str:
    """Markdown tables of all results in a folder's JSON lines files, of one model or of all.

    Raises:
        DareInputError: There is no such file, or none of that model, or a line cannot be used.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DareInputError(f"results: expected *.jsonl in {folder}; got none")
    read = {file.name: read_results(file) for file in files}
    there = sorted({one["model"] for results in read.values() for one in results})
    if model is not None and model not in there:
        raise DareInputError(f"model: expected one of {', '.join(there)}; got {model!r}")
    whole = [one for results in read.values() for one in results if one["arm"] == BASE]
    bases = {_place(one): one for one in sorted(whole, key=lambda one: -one["seed"])}
    parts = [
        _HEAD.format(of=model or "all models")
        + "\n".join(f"| `{name}` | {about} |" for name, (about, _) in COLUMNS.items())
    ]
    for name, results in read.items():
        places = sorted({_place(one) for one in results if model in (None, one["model"])})
        parts += [f"## {name.removesuffix('.jsonl')}"] * bool(places)
        for place in places:
            of, task, split, seed = place
            parts.append(f"### {of}, {task}, {split} (items seed {seed})")
            mine = [one for one in results if _place(one) == place]
            parts.append("\n".join(_table(mine, bases.get(place))))
    return "\n\n".join(parts) + "\n"


def _place(result: Result) -> tuple[Any, ...]:
    """What runs have in common that are held against each other."""
    return tuple(result[name] for name in ("model", "task", "split", "items_seed"))


def _table(results: Iterable[Result], base: Result | None) -> Iterator[str]:
    yield f"| budget | arm | seed | n | right % (95 %) | KV % | FLOPs % | prefill % | to {BASE} |"
    yield "|---" * 9 + "|"
    for one in sorted(results, key=_order):
        flops = one["flops_ratio"] or dict.fromkeys(PHASES, 1.0)
        low, high = wilson(one["right"].count("1") / one["n"], one["n"])
        cells = [
            "" if one["arm"] == BASE else one["budget"],
            one["arm"] + (f" ({one['change']})" if one["change"] else ""),
            one["seed"],
            one["n"],
            f"{_percent(one['accuracy'])} ({_percent(low)} to {_percent(high)})",
            _percent(1.0 if one["kv_ratio"] is None else one["kv_ratio"]),
            _percent(flops["all"]),
            _percent(flops["prefill"]),
            _against(base, one),
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _order(one: Result) -> tuple[Any, ...]:
    return one["arm"] != BASE, one["budget"], one["arm"], one["change"] or "", one["seed"]


def _against(base: Result | None, one: Result) -> str:
    """Points, their interval and p, over the items both have: the shorter begins the longer."""
    if base is None or one["arm"] == BASE:
        return ""
    n = min(base["n"], one["n"])
    left, mine = ([mark == "1" for mark in run["right"][:n]] for run in (base, one))
    found = compare_paired(left, mine)
    low, high = (_points(end) for end in found.interval)
    return f"{_points(found.difference)} ({low} to {high}), p {found.p_value:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


_HEAD = f"""# All results: {{of}}

`dare-hf tables docs/results` makes this page from the committed files of results; `--model NAME`
one of a single model: [anole](results-anole.md), [volcano](results-volcano.md). What the arms are
and what follows from them stands in [Router comparison](router-comparison.md), how they were made
in the [log](log.md). KV and FLOPs are shares of the same tokens' unpruned. The last column is the
difference to the arm "{BASE}" of the lowest seed on the same items, in points, with its 95 %
bootstrap interval and McNemar's p.

To add rows, put another `.jsonl` file into the folder and run the command: one JSON object a line
with these keys. A line that lacks one, or whose accuracy is not that of its items, is refused.

| key | |
|---|---|
"""
