"""Mutated files against every path that reads them.

    python scripts/fuzz.py --n 20000 --seed 0

Adapters' folders (apply_dare, PeftModel.from_pretrained and load_adapter, transformers'
load_adapter), configurations, recipes with their rows, and the config.json of models
(`dare-hf info`). Each input is to be refused by a DareError or to load; a model on which a load
failed is to be what it was, and so is one from which a loaded adapter is taken off. Prints one line
of figures; the exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"

import fuzz_mutations as mutations
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers.utils import logging

import dare_hf
from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.errors import DareError
from dare_hf.inspection import describe_model
from dare_hf.recipes import Recipe, load_recipe
from dare_hf.recipes.data import datasets_of
from dare_hf.testing import tiny_inputs, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_SECONDS, MOST_BYTES = 2.0, 200e6
_OWN = str(Path(dare_hf.__file__).parent) + os.sep


@dataclasses.dataclass
class Tally:
    """What came of the inputs so far; `wrong` describes what must not happen."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    wrong: Counter = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0
    largest: float = 0.0


def state_of(model: Any) -> list[Any]:
    """Everything a load could have changed on a model, comparable by ==."""
    seen: list[Any] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            # transformers' own notes: how it named weights, and that it holds no adapter (False)
            if key == "_weight_conversions" or (key == "_hf_peft_config_loaded" and not value):
                continue
            parts = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            plain = isinstance(value, (str, int, float, tuple, list)) or value is None
            seen.append((name, type(module), key, repr(value) if plain else parts))
    seen += [(id(p), p.requires_grad, p._version) for p in model.parameters()]
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        seen.append(sorted((key, repr(value)) for key, value in vars(config).items()))
    return seen


class Loads:
    """The ways to load an adapter's folder, on one model each.

    Args:
        good: A folder with a good adapter of that model.
    """

    def __init__(self, good: str) -> None:
        self.ways: dict[str, tuple[Any, Callable[[Any, str], Any], Callable[[Any, Any], Any]]] = {
            "apply_dare": (tiny_model("llava"), apply_dare, lambda m, _: remove_dare(m)),
            "from_pretrained": (
                tiny_model("llava"),
                PeftModel.from_pretrained,
                lambda _, loaded: loaded.unload(),
            ),
            "transformers": (
                tiny_model("llava"),
                lambda m, folder: m.load_adapter(folder, adapter_name="x"),
                lambda m, _: m.delete_adapter("x"),
            ),
        }
        second = PeftModel.from_pretrained(tiny_model("llava"), good)
        self.ways["second adapter"] = (
            second,
            lambda m, folder: m.load_adapter(folder, "x"),
            lambda m, _: m.delete_adapter("x"),
        )
        self.inputs = tiny_inputs(tiny_model("llava"))
        self.plain = {way: self.logits(model) for way, (model, *_) in self.ways.items()}

    @torch.no_grad()
    def logits(self, model: Any) -> Any:
        """The model's answer to one input."""
        return model(**self.inputs).logits


def adapter_case(loads: Loads, folder: Path, way: str, tally: Tally) -> str:
    """Load a folder one way; what came of it."""
    model, load, unload = loads.ways[way]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    before, active = state_of(inner), getattr(model, "active_adapter", None)
    try:
        loaded = load(model, str(folder))
        if way == "second adapter":
            model.set_adapter("x")
        try:
            found = loads.logits(loaded if way == "from_pretrained" else model)
            if not bool(found.isfinite().all()):
                tally.wrong[f"{way}: logits are not finite"] += 1
        finally:
            unload(model, loaded)
            if way == "second adapter":
                model.set_adapter(active)
        outcome = "loaded"
    except Exception as error:
        outcome = judged(error, way, tally)
    # peft's set_adapter and delete_adapter leave their marks on the adapter beside this one
    marked = way == "second adapter" and outcome == "loaded"
    changed = not marked and state_of(inner) != before
    if changed or not torch.equal(loads.logits(model), loads.plain[way]):
        tally.wrong[f"{way}: the model was changed ({outcome})"] += 1
        tally.counts["changed"] += 1
        loads.__init__(str(folder.parent / "good"))
    return outcome


def judged(error: Exception, way: str, tally: Tally) -> str:
    """Whether an error is a refusal, one of peft's before it comes to us, or foreign."""
    if isinstance(error, DareError):
        return "refused"
    frames = traceback.extract_tb(error.__traceback__)
    peft = way in ("from_pretrained", "transformers", "second adapter")
    if peft and not any(frame.filename.startswith(_OWN) for frame in frames):
        return "refused by peft"
    where = next((f for f in reversed(frames) if f.filename.startswith(_OWN)), frames[-1])
    place = f"{Path(where.filename).name}:{where.lineno}"
    tally.wrong[f"{way}: {type(error).__name__} at {place}: {str(error)[:80]}"] += 1
    tally.counts["foreign"] += 1
    return "foreign"


def attempt(way: str, tally: Tally, call: Callable[[], Any]) -> str:
    """Run what is to be refused or to work; what came of it."""
    try:
        call()
    except Exception as error:
        return judged(error, way, tally)
    return "loaded"


def read_recipe(path: Path) -> None:
    """What `dare-hf train` does before it loads weights."""
    recipe = load_recipe(path)
    if recipe.data is not None:
        datasets_of(recipe)


class Fuzzer:
    """Draws an input, runs it, and measures.

    Args:
        folder: An empty folder to write to.
        seed: Of the inputs.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.tally = folder, random.Random(seed), Tally()
        self.good = folder / "good"
        fields = {"scorer": "router", "schedule": "learned", "max_hops": 4}
        get_peft_model(tiny_model("llava"), DareConfig(**fields)).save_pretrained(self.good)
        tiny_model("llava").config.save_pretrained(folder / "model")
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        self.loads = Loads(str(self.good))
        self.config = json.loads((self.good / mutations.CONFIG).read_text())
        self.rows = [
            {"images": ["a.png"], "prompt": "<image> a", "response": f"b{k}"} for k in range(3)
        ]
        self.kinds = {"adapter": self.adapter, "config": self.from_fields, "recipe": self.recipe}
        self.kinds |= {"rows": self.data, "info": self.info}

    def adapter(self) -> str:
        """A spoiled adapter, loaded one way."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir()
        names = [f.name for f in dataclasses.fields(DareConfig)]
        mutations.adapter(self.good, case, self.rng, names)
        way = self.rng.choice(sorted(self.loads.ways))
        return self.timed(lambda: adapter_case(self.loads, case, way, self.tally))

    def from_fields(self) -> str:
        """Fields that a Python caller or a file gives."""
        names = [f.name for f in dataclasses.fields(DareConfig)]
        given = {
            n: mutations.value(self.rng) for n in self.rng.sample(names, self.rng.randint(1, 3))
        }
        model = self.loads.ways["apply_dare"][0]

        def call() -> None:
            config = DareConfig(**given)
            remove_dare(apply_dare(model, config))

        return self.timed(lambda: attempt("config", self.tally, call))

    def recipe(self) -> str:
        """A spoiled recipe."""
        good = "model: anole\nout: x\nsteps: 3\ntask: maze\nlora: {r: 4}\ndare:\n  max_hops: 2\n"
        names = [f.name for f in dataclasses.fields(Recipe)]
        path = self.folder / "recipe.yaml"
        path.write_bytes(mutations.recipe(good, self.rng, names))
        return self.timed(lambda: attempt("recipe", self.tally, lambda: read_recipe(path)))

    def data(self) -> str:
        """A good recipe with spoiled rows."""
        (self.folder / "rows.jsonl").write_bytes(mutations.rows(self.rows, self.rng))
        path = self.folder / "recipe.yaml"
        path.write_text(f"model: anole\nout: x\ndata: {self.folder / 'rows.jsonl'}\n")
        return self.timed(lambda: attempt("rows", self.tally, lambda: read_recipe(path)))

    def info(self) -> str:
        """The config.json of a model, spoiled."""
        good = json.loads((self.folder / "model" / "config.json").read_text())
        case = self.folder / "spoiled-model"
        case.mkdir(exist_ok=True)
        place = self.rng.choice([good, good["text_config"], good["vision_config"]])
        place |= json.loads(mutations.object_text(place, self.rng, sorted(place)))
        text = json.dumps(good).encode()
        text = mutations.damaged(text, self.rng) if self.rng.random() < 0.2 else text
        (case / "config.json").write_bytes(text)
        call = lambda: list(describe_model(str(case)))  # noqa: E731
        return self.timed(lambda: attempt("info", self.tally, call))

    def timed(self, call: Callable[[], str]) -> str:
        """Run, and note seconds and memory."""
        before, start = _peak(), time.process_time()
        outcome = call()
        seconds, grown = time.process_time() - start, _peak(reset=False) - before
        if seconds > MOST_SECONDS or grown > MOST_BYTES:
            self.tally.wrong[f"{outcome} after {seconds:.1f} s, {grown / 1e6:.0f} MB"] += 1
        self.tally.slowest = max(self.tally.slowest, seconds)
        self.tally.largest = max(self.tally.largest, grown)
        return outcome

    def run(self, n: int, only: str | None = None) -> Tally:
        """Run n inputs; half of them are adapters."""
        weights = {"adapter": 50, "config": 15, "recipe": 15, "rows": 10, "info": 10}
        kinds = [only] if only else list(weights)
        for done in range(n):
            if done % 500 == 0:
                print(f"{done} done, {sum(self.tally.wrong.values())} wrong", file=sys.stderr)
            kind = self.rng.choices(kinds, [weights[k] for k in kinds])[0]
            outcome = self.kinds[kind]()
            self.tally.counts[outcome if outcome != "foreign" else "foreign outcome"] += 1
            self.tally.counts[f"{kind} {outcome}"] += 1
        return self.tally


def _peak(reset: bool = True) -> float:
    """Bytes: the highest resident memory since the last reset; after one, what is held now."""
    if not Path("/proc/self/clear_refs").exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@contextlib.contextmanager
def silence() -> Any:
    """Neither the loaders' warnings nor their progress bars."""
    for name in ("transformers", "dare_hf"):
        logging.get_logger(name).setLevel(logging.CRITICAL)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def line(tally: Tally, n: int, seed: int, seconds: float) -> str:
    """The figures."""
    counts = tally.counts
    return (
        f"inputs {n} (seed {seed}), refused {counts['refused']}, refused by peft before DARE saw "
        f"them {counts['refused by peft']}, loaded {counts['loaded']}, foreign exceptions "
        f"{counts['foreign']}, changed models {counts['changed']}, slowest {tally.slowest:.2f} s, "
        f"largest {tally.largest / 1e6:.0f} MB, {seconds:.0f} s in all"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="adapter, config, recipe, rows or info")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, silence():
        tally = Fuzzer(Path(folder), given.seed).run(given.n, given.only)
    for what, count in tally.wrong.most_common(60):
        print(f"{count:6} {what}", file=sys.stderr)
    print(line(tally, given.n, given.seed, time.perf_counter() - start))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
