"""Random runs against the laws of docs/method.md, section 8.

    python scripts/soak.py --n 10000 --seed 0
    python scripts/soak.py --seed 0 --only 1234

A case is an architecture, a batch, a way to generate and a configuration, all drawn from the seed
and the case's number. Each case is held to every law that speaks of it; what breaks one prints a
line that repeats the case alone, and the run goes on. Prints one line of figures at the end; the
exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"

import soak_laws
import torch
from soak_cases import ARCHITECTURES, draw
from soak_run import Run, undecided
from transformers.utils import logging

from dare_hf.errors import DareError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from soak_cases import Case


@dataclass
class Tally:
    """What came of the cases so far.

    Attributes:
        architectures: Cases by model_type.
        modes: Cases by the way they generate.
        laws: Checks by law.
        wrong: What broke, one line each.
        undecided: Checks that failed on a case that noise decides.
        refused: Cases that are to be refused, and were.
    """

    architectures: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    laws: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    refused: int = 0


def run_case(case: Case, seed: int, tally: Tally) -> None:
    """Hold one case to the laws, and count."""
    tally.architectures[case.arch] += 1
    tally.modes[case.mode] += 1
    broken = []
    try:
        run = Run(case)
        for name, check in soak_laws.checks(run):
            try:
                check(run)
                tally.laws[name] += 1
            except Exception as error:
                broken.append((name, _told(error)))
        tally.refused += case.mode == "refused" and not broken
    except Exception as error:
        broken.append(("runs", _told(error)))
    if not broken:
        return
    noisy = broken[0][0] not in ("runs", "remove", "refusal") and undecided(case)
    found = tally.undecided if noisy else tally.wrong
    for name, text in broken:
        found.append(
            f"case {case.number}: law {name}: {text}  [{case.arch}, {case.dtype}, {case.mode}]  "
            f"python scripts/soak.py --seed {seed} --only {case.number}"
        )
        print(("undecided " if noisy else "WRONG ") + found[-1], file=sys.stderr, flush=True)


def _told(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    kind = "refused, " if isinstance(error, DareError) else ""
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{kind}{type(error).__name__} at {place}: {' '.join(str(error).split())[:200]}"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No warnings of loaders, of transformers or of untrained pruning."""
    for name in ("transformers", "dare_hf"):
        logging.get_logger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def soak(numbers: Iterable[int], seed: int, *, every: int = 500) -> Tally:
    """Run the cases of these numbers."""
    tally, start = Tally(), time.perf_counter()
    with silence():
        for done, number in enumerate(numbers):
            if done and done % every == 0:
                spent = time.perf_counter() - start
                print(f"{done} done, {line(tally, seed, spent)}", file=sys.stderr, flush=True)
            run_case(draw(seed, number), seed, tally)
    return tally


def line(tally: Tally, seed: int, seconds: float) -> str:
    """The figures."""
    parts = [f"{name} {count}" for name, count in sorted(tally.laws.items())]
    return (
        f"cases {tally.modes.total()} (seed {seed}), architectures {len(tally.architectures)}, "
        f"wrong {len(tally.wrong)}, refused {tally.refused}, undecided {len(tally.undecided)}, "
        f"checks {tally.laws.total()} ({', '.join(parts)}), {seconds:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run one case and show it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers: Iterable[int] = range(given.first, given.first + given.n)
    if given.only is not None:
        numbers = [given.only]
        print(draw(given.seed, given.only), file=sys.stderr)
    start = time.perf_counter()
    tally = soak(numbers, given.seed)
    for name in (a for a in ARCHITECTURES if tally.architectures[a]):
        print(f"{tally.architectures[name]:6} {name}", file=sys.stderr)
    print(" ".join(f"{mode} {n}" for mode, n in tally.modes.most_common()), file=sys.stderr)
    print(line(tally, given.seed, time.perf_counter() - start))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
