"""Write the way of a token through dare_hf, and the picture of its rooms, into docs/.

`sys.setprofile` notes each function of the package as it is first passed, on a tiny LLaVA: in one
layer of a prefill, one decode step, the begin of one hop and one training forward. Functions are
counted once; comprehensions, which are no functions from Python 3.12 on, are not.
"""

import sys
import textwrap
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import peft
import torch
from rooms import picture

import dare_hf
from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.engine.controller import Controller
from dare_hf.hops.compaction import due_rows
from dare_hf.testing import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "walk.md", ROOT / "docs" / "pictures" / "rooms.svg"
BEGIN, END = "<!-- written by scripts/walk.py -->\n", "<!-- end -->"
PACKAGE = str(Path(dare_hf.__file__).parent)
RATES: dict[str, Any] = {"vision_retention": 0.5, "schedule": "constant"}
LAYER = 2
"""A layer of the tiny model that prunes and has pruned ones before and behind it."""


class Walk:
    """The functions of the package passed inside the block, in the order of their first calls."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], None] = {}

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code: CodeType = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and code.co_name[0] != "<":
            name = code.co_qualname.replace("<locals>.", "")
            self.passed[Path(code.co_filename).relative_to(PACKAGE).as_posix(), name] = None

    def __enter__(self) -> "Walk":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    @property
    def files(self) -> int:
        """Files they stand in."""
        return len({file for file, _ in self.passed})

    def told(self) -> str:
        """The stays in files, one after the other."""
        groups = groupby(self.passed, key=lambda place: place[0].removesuffix(".py"))
        stays = [f"{file}: {', '.join(name for _, name in names)}" for file, names in groups]
        return textwrap.fill(" > ".join(stays), 118, break_on_hyphens=False)


def watched(owner: Any, number: int) -> Walk:
    """The walk of call `number` of the forward put on a module."""
    walk, inner, calls = Walk(), vars(owner)["forward"], []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != number:
            return inner(*args, **kwargs)
        with walk:
            return inner(*args, **kwargs)

    object.__setattr__(owner, "forward", forward)
    return walk


def generate(model: Any, tokens: int) -> None:
    """Sample from the tiny prompt, by the most likely token each time."""
    model.generate(**tiny_inputs(model), max_new_tokens=tokens, do_sample=False)


def prefill_and_step() -> tuple[Walk, Walk, Walk]:
    """A prefill layer, a decode step, and one layer of such a step."""
    found = []
    for place, number in ((LAYER, 1), (None, 4), (LAYER, 4)):
        model = apply_dare(tiny_model("llava"), DareConfig(**RATES))
        anatomy = model._dare.controller.anatomy
        found.append(watched(anatomy.hooked[0] if place is None else anatomy.layers[place], number))
        generate(model, 6)
        remove_dare(model)
    return found[0], found[1], found[2]


def boundary() -> Walk:
    """The first begin of a hop that takes tokens away."""
    walk, inner = Walk(), Controller._compact

    def compact(self: Controller, cache: Any, *args: Any) -> None:
        if walk.passed or max(due_rows(cache)) < 2:
            return inner(self, cache, *args)
        with walk:
            return inner(self, cache, *args)

    model = apply_dare(tiny_model("llava"), DareConfig(**RATES, decode_window=3))
    Controller._compact = compact
    try:
        generate(model, 12)
    finally:
        Controller._compact = inner
    return walk


def training() -> Walk:
    """A forward with labels of a model whose routers learn."""
    fields = {**RATES, "schedule": "learned", "decode_window": 3}
    wrapped = peft.get_peft_model(tiny_model("llava"), DareConfig(scorer="router", **fields))
    model = wrapped.get_base_model().train()
    walk = watched(model._dare.controller.anatomy.hooked[0], 1)
    inputs = tiny_inputs(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    wrapped(**inputs, labels=labels)
    return walk


def section() -> str:
    """The page's part: how much each way passes, and what in which order."""
    layer, step, step_layer = prefill_and_step()
    walks = {
        "One layer of a prefill": layer,
        "One decode step": step,
        "One layer of a decode step": step_layer,
        "The begin of a hop": boundary(),
        "One training forward": training(),
    }
    rows = [f"| {name} | {walk.files} | {len(walk.passed)} |" for name, walk in walks.items()]
    parts = ["\n".join(["| way | files | functions |", "|---|---|---|", *rows])]
    parts += [f"## {name}\n\n```text\n{walk.told()}\n```" for name, walk in walks.items()]
    return "\n\n".join(parts)


def renewed(page: str) -> str:
    """The page with its part as it is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{section()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    torch.manual_seed(0)
    page = PAGE.read_text(encoding="utf-8")
    made = {PAGE: renewed(page), PICTURE: picture()}
    if "--check" in sys.argv:
        stale = [path.name for path, text in made.items() if path.read_text("utf-8") != text]
        sys.exit(f"{', '.join(stale)}: run scripts/walk.py" if stale else 0)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
