"""What a training file says, checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from dare_hf.config import DareConfig
from dare_hf.config.checks import flag, integer, number, optional, refuse, shown, text
from dare_hf.errors import DareConfigError
from dare_hf.recipes.yaml_file import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TASKS = ("maze", "frozen_lake", "ghost", "scene", "board")


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        model: An embedded model ("anole", "volcano"), a folder or a hub id.
        out: Folder that receives `dare/` (the router adapter) and `lora/`, where there is one.
        task: Tasks of the embedded models whose training stream is learned, mixed evenly.
        data: Instead: a JSON lines file of {"images": [paths], "prompt": ..., "response": ...}; the
            processor's image token stands where a picture does, paths are relative to the file.
        dare: Fields of DareConfig; scorer and schedule are "router" and "learned" unless given.
            None trains the LoRA on the unpruned model, the control of any comparison.
        calibrate: Rows that routers, and learned rates, are first fitted to in closed form
            (`calibration.fit_router`); 0 starts from chance.
        equal_rates: Learned rates start at their targets, not at fitted ones.
        rate_margin: Fitted rates start between this and 1 minus this: a rate near 1 spares what a
            layer needs whole, and is slow to move.
        lora: Fields of peft's LoraConfig; None leaves the backbone as it is.
        load_in_4bit: Load the backbone in nf4 (bitsandbytes).
        steps: Optimiser steps.
        batch_size: Rows of a forward.
        accumulate: Forwards of a step.
        learning_rate: Of the LoRA.
        router_lr: Of router weights.
        rate_lr: Of learned rates.
        warmup: Steps of linear warm-up; a cosine to a twentieth follows.
        seed: Of data order, weights and noise.
        first: First item of the task streams.
        bf16: Autocast of matrix products.
        gradient_checkpointing: Recompute layers instead of keeping them.
        save_every: Steps between checkpoints; 0 saves at the end only.
        validate: Rows held out (the last of `data`, or items behind the run's). Of the checkpoints,
            the one with the lowest loss on them is what is saved; 0 saves the last step.
    """

    model: str
    out: str
    task: tuple[str, ...] = ()
    data: str | None = None
    dare: dict[str, Any] | None = field(default_factory=dict)
    calibrate: int = 0
    equal_rates: bool = False
    rate_margin: float = 0.01
    lora: dict[str, Any] | None = None
    load_in_4bit: bool = False
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    router_lr: float = 1e-3
    rate_lr: float = 1e-2
    warmup: int = 50
    seed: int = 0
    first: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 0
    validate: int = 0

    def __post_init__(self) -> None:
        """Check what cannot wait until the model is loaded.

        Raises:
            DareConfigError: A value that no run could use.
        """
        for name, check in _CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        names = self.task
        if bool(names) == bool(self.data):
            raise DareConfigError(
                f"task, data: expected one of them; got task={list(names)} and data={self.data!r}. "
                "Name tasks of an embedded model, or a JSON lines file"
            )
        if unknown := sorted(set(names) - set(TASKS)):
            raise DareConfigError(f"task: expected some of {', '.join(TASKS)}; got {unknown}")
        if self.validate and (not self.save_every or self.steps % self.save_every):
            raise DareConfigError(
                "save_every: expected a divisor of the steps where rows are held out (validate), "
                f"since checkpoints are compared; got {self.save_every} and {self.steps} steps"
            )
        if self.dare is None and self.lora is None:
            raise DareConfigError(
                "dare, lora: expected at least one of them to train; got neither. Write dare: {}"
            )
        self.dare_config(())
        if self.lora is not None:
            _check_lora(self.lora)

    def dare_config(self, delimiters: tuple[int, ...]) -> DareConfig:
        """The configuration of the adapter.

        Args:
            delimiters: Hop delimiters of the task, used where the recipe names none.

        Raises:
            DareConfigError: A field that DareConfig does not have, or a value out of range.
        """
        if self.dare is None:  # nothing is pruned; hops are counted as in all other runs
            return DareConfig(
                scorer="random",
                vision_retention=1.0,
                text_retention=1.0,
                schedule="constant",
                hop_delimiters=delimiters,
            )
        given: dict[str, Any] = {
            "scorer": "router",
            "schedule": "learned",
            "seed": self.seed,
        } | self.dare
        given.setdefault("hop_delimiters", delimiters)
        known = {one.name for one in fields(DareConfig)}
        if unknown := sorted(set(given) - known):
            raise DareConfigError(f"dare: expected fields of DareConfig; got {shown(unknown)}")
        return DareConfig(**given)


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a YAML file.

    Args:
        path: The file.
        overrides: Fields that replace the file's; None leaves them.

    Raises:
        DareConfigError: The file cannot be read, or does not say what a Recipe needs.
    """
    given, lines = read_yaml(path)
    given |= {name: value for name, value in overrides.items() if value is not None}
    known = {one.name for one in fields(Recipe)}
    if unknown := sorted(set(given) - known):
        raise DareConfigError(
            f"config: expected some of {', '.join(sorted(known))}; got {', '.join(unknown)[:200]} "
            f"(line {lines.get(unknown[0])} of {path})"
        )
    if missing := sorted({"model", "out"} - set(given)):
        raise DareConfigError(f"config: expected {' and '.join(missing)} in {path}; got neither")
    try:
        return Recipe(**given)
    except DareConfigError as error:
        name = next(iter(re.findall(r"\w+", str(error))), "")  # an error begins with its field
        if name not in lines or name in overrides:
            raise
        raise DareConfigError(f"{error} (line {lines[name]} of {path})") from error


def _tasks(name: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(one, str) for one in names):
        raise refuse(name, "the name of a task, or a list of names", value)
    return tuple(names)


def _members(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise refuse(name, "names and values", value)
    return value


def _check_lora(given: dict[str, Any]) -> None:
    """Refuse what peft would only refuse when the model has been loaded."""
    from peft import LoraConfig

    least = {
        "r": integer("an integer >= 1", 1, 65536),
        "lora_alpha": number("a number > 0", above=0),
    }
    least["lora_dropout"] = number("a number in [0, 1]", least=0, most=1)
    for name, check in least.items():
        if name in given:
            check(name, given[name])
    try:
        LoraConfig(**given)
    except Exception as error:  # peft checks little, and in many ways
        raise DareConfigError(
            f"lora: expected fields of peft's LoraConfig; got {shown(given)}: {str(error)[:200]}"
        ) from error


_some = integer("an integer >= 1", 1)
_any = integer("an integer >= 0", 0)
_rate = number("a finite number >= 0", least=0)
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "model": text("a model's name, folder or hub id"),
    "out": text("a folder"),
    "task": _tasks,
    "data": optional(text("a file")),
    "dare": optional(_members),
    "calibrate": _any,
    "equal_rates": flag,
    "rate_margin": number("a share in (0, 0.5)", above=0, most=math.nextafter(0.5, 0)),
    "lora": optional(_members),
    "load_in_4bit": flag,
    "steps": _some,
    "batch_size": _some,
    "accumulate": _some,
    "learning_rate": _rate,
    "router_lr": _rate,
    "rate_lr": _rate,
    "warmup": _any,
    "seed": integer("an integer >= 0", 0, 2**32 - 1),
    "first": _any,
    "bf16": flag,
    "gradient_checkpointing": flag,
    "save_every": _any,
    "validate": _any,
}
