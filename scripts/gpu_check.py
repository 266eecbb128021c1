"""What DARE does on a GPU: laws, times and memory of a random 7B model, within five minutes.

    python scripts/gpu_check.py --out gpu              # one H100 or H200; needs no hub, no network
    python scripts/gpu_check.py --dry-run --out dry    # the same way on a CPU, small shapes

Writes OUT.json anew after each section, and OUT.md, a page of its tables. A section that fails or
runs out of its time says so there, and the next one goes on. Exit code 1 if a section failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gpu_sections import Check, Rows
from gpu_shapes import DRY, FULL

from dare_hf.benchmark.figures import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 285.0  # seconds in all; what is left of five minutes is for the start

SECTIONS: dict[str, float] = {
    "laws": 40,
    "operations": 15,
    "first_token": 60,
    "decode": 70,
    "peak_memory": 20,
    "largest_batch": 45,
    "compiled": 60,
    "nf4": 40,
}
"""In this order, each with the seconds it may take."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A TimeoutError after so many seconds."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than the {seconds:.0f} s it had")

    before = signal.signal(signal.SIGALRM, ring)
    other = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *other)  # of a test, say


def run(check: Check, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All sections, saved after each.

    Args:
        check: What is run.
        save: Takes the result so far.
    """
    begun = time.monotonic()
    result: dict[str, Any] = {**machine(check.shapes.large.device), "sections": {}}
    for name, seconds in SECTIONS.items():
        start = time.monotonic()
        told: dict[str, Any] = {}
        left = check.shapes.patience * min(seconds, LIMIT - (start - begun))
        try:
            if left <= 0:
                raise TimeoutError("the five minutes are over")
            with at_most(left):
                told["rows"] = getattr(check, name)()
        except Exception as error:  # one section, whatever is wrong with it; the next goes on
            told["error"] = f"{type(error).__name__}: {error}"[:500]
        check.tidy()
        told["seconds"] = time.monotonic() - start
        result["sections"][name] = told
        save(result)
    return result


def page(result: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    facts = ("hardware", "torch", "transformers", "dare_hf", "python")
    parts = ["# GPU check", ", ".join(f"{fact} {result[fact]}" for fact in facts)]
    for name, told in result["sections"].items():
        parts.append(f"## {name} ({told['seconds']:.1f} s)")
        parts.append(_table(told["rows"]) if "rows" in told else f"failed: {told['error']}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument("--dry-run", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check: expected a CUDA device; there is none. --dry-run runs on a CPU")

    def save(result: dict[str, Any]) -> None:
        for ending, text in ((".json", json.dumps(result, indent=1)), (".md", page(result))):
            fresh = args.out.with_suffix(f"{ending}.new")
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(args.out.with_suffix(ending))
        name, told = list(result["sections"].items())[-1]
        print(f"{name}: {told['seconds']:.1f} s {told.get('error', '')}", flush=True)

    result = run(Check(DRY if args.dry_run else FULL), save)
    print(page(result))
    sys.exit(any("error" in told for told in result["sections"].values()))


if __name__ == "__main__":
    main()
