"""What a training file says, checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dare_hf.config import DareConfig
from dare_hf.errors import DareConfigError

TASKS = ("maze", "frozen_lake", "ghost", "scene")


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
        names = (self.task,) if isinstance(self.task, str) else tuple(self.task)
        object.__setattr__(self, "task", names)
        if bool(names) == bool(self.data):
            raise DareConfigError(
                f"task, data: expected one of them; got task={list(names)} and data={self.data!r}. "
                "Name tasks of an embedded model, or a JSON lines file"
            )
        if unknown := sorted(set(names) - set(TASKS)):
            raise DareConfigError(f"task: expected some of {', '.join(TASKS)}; got {unknown}")
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "calibrate": 0}
        least |= {"save_every": 0, "validate": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise DareConfigError(f"{name}: expected an integer >= {low}; got {value!r}")
        if not isinstance(self.rate_margin, float) or not 0 < self.rate_margin < 0.5:
            raise DareConfigError(
                f"rate_margin: expected a share in (0, 0.5); got {self.rate_margin!r}"
            )
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
            raise DareConfigError(f"dare: expected fields of DareConfig; got {', '.join(unknown)}")
        return DareConfig(**given)


def load_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """Read a YAML file.

    Args:
        path: The file.
        overrides: Fields that replace the file's; None leaves them.

    Raises:
        DareConfigError: The file cannot be read, or does not say what a Recipe needs.
    """
    import yaml

    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DareConfigError(f"config: expected a YAML file; got {path}: {error}") from error
    if not isinstance(given, dict):
        raise DareConfigError(f"config: expected names and values in {path}; got {given!r}")
    given |= {name: value for name, value in overrides.items() if value is not None}
    known = {one.name for one in fields(Recipe)}
    if unknown := sorted(set(given) - known):
        raise DareConfigError(
            f"config: expected some of {', '.join(sorted(known))}; got {', '.join(unknown)}"
        )
    if missing := sorted({"model", "out"} - set(given)):
        raise DareConfigError(f"config: expected {' and '.join(missing)} in {path}; got neither")
    return Recipe(**given)
