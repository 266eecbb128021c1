"""Change the code that decides what is kept, one small change at a time, and see a test fail.

    pip install coverage && python scripts/mutate.py --n 400 --seed 0 --out mutants.jsonl

First the fast tests run once under coverage, which tells the tests that pass through each line.
Then a sample of changes (scripts/mutation_points.py), stratified by file, each in a process of its
own: the quickest tests of the changed line first, up to `--seconds` of them. A change is killed
when a test fails or the tests hang; what survives is either a missing test or a change that alters
nothing, and is to be looked at. Goes on where `--out` ends. Prints the score with its Wilson
interval. `--only FILE:LINE` takes every change of one line, `--again` the survivors of a run.
"""

from __future__ import annotations

import argparse
import collections
import importlib.machinery
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = os.environ["CI"] = os.environ["OMP_NUM_THREADS"] = "1"

import coverage
import mutation_points
import peft  # noqa: F401
import pytest
import torch
import transformers.generation  # noqa: F401  (imported once, here, for every child)
from transformers.models.llama import modeling_llama  # noqa: F401
from transformers.models.llava import modeling_llava  # noqa: F401
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
# The judge itself is no subject.
NOT_THESE = {"dare_hf/routing/reference.py"}
PLACES = ("routing/*.py", "cache/*.py", "hops/*.py", "engine/masks.py", "engine/planner.py")
# Tests that take long and pass through everything, or start processes of their own.
NOT_TESTS = {
    "demo",
    "conformance",
    "eval",
    "cli",
    "examples",
    "docs",
    "packaging",
    "fuzz",
    "mutate",
}
MINIMUM = 4  # changes of a small file


def subjects() -> list[Path]:
    """The files that are changed."""
    found = sorted(p for place in PLACES for p in (ROOT / "dare_hf").glob(place))
    return [p.relative_to(ROOT) for p in found if str(p.relative_to(ROOT)) not in NOT_THESE]


def sample(n: int, seed: int) -> list[tuple[str, mutation_points.Point]]:
    """At least `n` changes, shared among the files by how many each has."""
    by_file = {str(p): mutation_points.points((ROOT / p).read_text()) for p in subjects()}
    total = sum(map(len, by_file.values()))
    chosen = []
    for name, found in by_file.items():
        share = min(len(found), max(MINIMUM, math.ceil(n * len(found) / total)))
        drawn = random.Random(f"{seed} {name}").sample(found, share)
        chosen += [(name, point) for point in sorted(drawn, key=lambda p: (p.line, p.index))]
    return chosen


class Recorder:
    """A pytest plugin: which lines each passing test runs, and how long it takes."""

    def __init__(self, tracer: coverage.Coverage) -> None:
        self.tracer = tracer
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.failed: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """From here on lines are that test's."""
        self.tracer.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how long it took, and whether it passed."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def in_child(work: Callable[[], int], seconds: float) -> int | None:
    """The exit code of `work()` in a process of its own; None when it had to be ended."""
    child = os.fork()
    if child == 0:
        os.setsid()
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 99
        try:
            code = int(work())

        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(nodes: list[str], *plugins: object, first: bool = True) -> int:
    options = ["-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-m", "not slow and not extras"]
    # This process has imported what pytest would rewrite.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os.chdir(ROOT)
    return pytest.main([*options, *(["-x"] if first else []), *nodes], plugins=list(plugins))


def record_lines(path: Path, tests: list[Path]) -> None:
    """Write to `path` which of the tests run each line, and how long each takes."""

    def work() -> int:
        tracer = coverage.Coverage(
            data_file=None, config_file=False, include=[str(ROOT / p) for p in subjects()]
        )
        recorder = Recorder(tracer)
        tracer.start()
        run_tests([str(test.resolve()) for test in tests], recorder, first=False)
        tracer.stop()
        data = tracer.get_data()
        lines: dict[str, dict[str, list[str]]] = {}
        for file in data.measured_files():
            contexts = data.contexts_by_lineno(file)
            lines[str(Path(file).relative_to(ROOT))] = {
                str(line): [t for t in tests_of if t and t not in recorder.failed]
                for line, tests_of in contexts.items()
            }
        path.write_text(json.dumps({"lines": lines, "seconds": recorder.seconds}))
        return 0

    if in_child(work, 6 * 3600) != 0:
        sys.exit("the tests could not be recorded")


class Mutated:
    """Makes the import of one file see other text; nothing on disk changes."""

    def __init__(self, file: Path, source: str) -> None:
        self.file, self.source = str(file), source.encode()

    def install(self) -> None:
        """From here on, in this process."""
        loader = importlib.machinery.SourceFileLoader
        read, stat = loader.get_data, loader.path_stats

        def get_data(this, path):
            return self.source if str(path) == self.file else read(this, path)

        def path_stats(this, path):
            if str(path) == self.file:
                raise OSError("no bytecode of it")
            return stat(this, path)

        loader.get_data, loader.path_stats = get_data, path_stats


def judge(name: str, point: mutation_points.Point, table: dict, seconds: float) -> dict:
    """What became of one change."""
    source = mutation_points.mutate((ROOT / name).read_text(), point)
    known = table["lines"].get(name, {})
    tests = known.get(str(point.line), [])
    cost = table["seconds"]
    tests = sorted(tests, key=lambda t: cost.get(t, 0.0))
    stages: list[list[str]] = [[], []]
    spent = 0.0
    for test in tests:
        spent += cost.get(test, 0.0)
        if spent <= seconds:
            stages[spent > seconds / 8].append(test)
    row = {"file": name, "line": point.line, "index": point.index, "what": point.what}
    row["text"] = (ROOT / name).read_text().splitlines()[point.line - 1].strip()
    row |= {"tests": len(tests), "tried": sum(map(len, stages)), "result": "survived"}
    started = time.monotonic()
    for nodes in filter(None, stages):

        def work(nodes=nodes) -> int:
            Mutated(ROOT / name, source).install()
            return run_tests(nodes)

        code = in_child(work, 60 + 10 * seconds)
        if code != 0:
            row["result"] = "hung" if code is None else "killed"
            break
    return row | {"seconds": round(time.monotonic() - started, 1)}


def wilson(killed: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share, z2 = killed / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return middle - half, middle + half


def default_tests() -> list[Path]:
    tests = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [test for test in tests if test.stem.removeprefix("test_") not in NOT_TESTS]


def wanted(args: argparse.Namespace) -> list[tuple[str, mutation_points.Point]]:
    if args.only:
        name, line = args.only.rsplit(":", 1)
        found = mutation_points.points((ROOT / name).read_text())
        return [(name, point) for point in found if point.line == int(line)]
    if args.again:
        rows = map(json.loads, args.again.read_text().splitlines())
        return [
            (r["file"], mutation_points.Point(r["index"], r["line"], r["what"]))
            for r in rows
            if r["result"] == "survived"
        ]
    return sample(args.n, args.seed)


def main() -> int:
    """Run the sample; 1 when the score is under `--floor`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests for one change")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--lines", type=Path, help="keep the table of lines and tests here")
    parser.add_argument("--tests", type=Path, nargs="+", help="these files alone")
    parser.add_argument("--only", help="FILE:LINE")
    parser.add_argument("--again", type=Path, help="a file of `--out`: its survivors")
    parser.add_argument("--floor", type=float, default=0.9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = args.lines or Path(folder) / "lines.json"
        if not lines.exists():
            record_lines(lines, args.tests or default_tests())
        table = json.loads(lines.read_text())
    done = [json.loads(r) for r in args.out.read_text().splitlines()] if args.out.exists() else []
    seen = {(r["file"], r["index"], r["what"]) for r in done}
    for name, point in wanted(args):
        if (name, point.index, point.what) in seen:
            continue
        row = judge(name, point, table, args.seconds)
        done.append(row)
        with args.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if row["result"] == "survived":
            print(f"survived: {name}:{row['line']} {row['what']}: {row['text']}", flush=True)
    killed = sum(r["result"] != "survived" for r in done)
    low, high = wilson(killed, len(done))
    print(f"{killed} of {len(done)} killed: {killed / len(done):.3f} ({low:.3f} to {high:.3f})")
    return int(killed / len(done) < args.floor)


if __name__ == "__main__":
    sys.exit(main())
