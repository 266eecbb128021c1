"""What is raced: the same weights under transformers' own caches, under DARE and under a peer."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dare_hf import DareConfig, apply_dare, register_scorer, remove_dare
from dare_hf.benchmark.random_llava import (
    CLOCKS,
    IMAGE_ID,
    build_inputs,
    build_model,
    linear_scorer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dare_hf.benchmark.random_llava import Setting

SCORER = "bench_linear"
VISION_RETENTION, TEXT_RETENTION = 0.4, 0.7
PLAIN, STATIC, WHOLE, PRUNED = "plain", "static", "dare_1.0", "dare_0.4_0.7"
POOLED = "dare_0.4_0.7_pooled"
RATES = {
    WHOLE: (1.0, 1.0),
    PRUNED: (VISION_RETENTION, TEXT_RETENTION),
    POOLED: (VISION_RETENTION, TEXT_RETENTION),
}
FIELDS = {POOLED: {"hop_budget": "pooled"}}
"""What a system's configuration has beside its rates."""


@dataclass(frozen=True)
class Subject:
    """A model and what it is asked.

    Attributes:
        model: The unpatched model in eval mode.
        inputs: From a setting to the arguments of generate.
        options: Further arguments of every generate.
        scorer: Scorer of the systems with DARE.
        score: The same as a function, by which the oracle judges the choice of tokens; None where
            it cannot be asked from outside (attention).
        facts: What the JSON says of it.
        clock: Takes the time.
    """

    model: Any
    inputs: Callable[[Setting], dict[str, Any]]
    options: dict[str, Any]
    scorer: str
    score: Callable[..., Any] | None
    facts: dict[str, Any]
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class System:
    """A way to run the subject.

    Attributes:
        name: One of the names above, or a peer's.
        model: The model with what it needs on it.
        rates: Retention (vision, text); None where DARE is not on the model.
        options: Further arguments of generate.
        checked: Whether the oracle knows what its tokens have to be.
        clock: Takes the time.
    """

    name: str
    model: Any
    rates: tuple[float, float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    checked: bool = True
    clock: Callable[[], float] = time.perf_counter


def random_subject(setting: Setting) -> Subject:
    """The random model of a setting.

    Raises:
        DareConfigError: It cannot be run here.
    """
    setting.check()
    model, score = build_model(setting), linear_scorer(setting)
    register_scorer(SCORER, score)
    parameters = sum(p.numel() for p in model.model.language_model.parameters())
    return Subject(
        model=model,
        inputs=build_inputs,
        options={"suppress_tokens": [IMAGE_ID]},
        scorer=SCORER,
        score=score,
        facts={"model": "random", "parameters": parameters},
        clock=CLOCKS[setting.clock],
    )


@contextmanager
def on_systems(
    subject: Subject,
    names: Sequence[str],
    **fields: Any,
) -> Iterator[list[System]]:
    """The systems, in the order of `names`; nothing is left on any model after.

    Args:
        subject: What they run.
        names: Of those above.
        fields: Further fields of DARE's configuration.
    """
    with ExitStack() as stack:
        yield [_system(subject, name, fields, stack) for name in names]


def twin(model: Any) -> Any:
    """A copy that shares every weight."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _system(subject: Subject, name: str, fields: dict[str, Any], stack: ExitStack) -> System:
    if name == PLAIN:
        return System(name, subject.model, clock=subject.clock)
    if name == STATIC:
        # Eager: on a GPU generate would compile it unasked, and no other system is compiled.
        options = {"cache_implementation": "static", "disable_compile": True}
        return System(name, subject.model, options=options, clock=subject.clock)
    vision, text = RATES[name]
    model = twin(subject.model)
    own: dict[str, Any] = {"schedule": "constant", "scorer": subject.scorer}
    own |= fields | FIELDS.get(name, {})
    config = DareConfig(vision_retention=vision, text_retention=text, **own)
    apply_dare(model, config)
    stack.callback(remove_dare, model)
    return System(name, model, (vision, text), clock=subject.clock)
