"""Runs of generate, timed token by token; those of several systems take turns, step by step.

A machine slows down and speeds up. Where every system runs its next step before any runs the one
after, that hits all alike, and the ratio of two steps of one round means something.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import LogitsProcessor

from dare_hf.compat import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from dare_hf.benchmark.systems import System

_T = TypeVar("_T")
_LOGITS = 14  # steps whose logits are held for the oracle
_IMPATIENT = 600.0  # seconds; no step takes that long


@dataclass
class Outcome:
    """What a run of generate did.

    Attributes:
        seconds: To the first token, then of every further one.
        ids: Long[B, N], prompt and written tokens.
        logits: Of the first steps, [B, V] each in float32 on the CPU; -inf where suppressed.
        cache: As the run left it.
    """

    seconds: list[float] = field(default_factory=list)
    ids: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    cache: Any = None


class _Watch(LogitsProcessor):
    """Takes the time between two calls, and waits after each until it may go on."""

    def __init__(
        self,
        outcome: Outcome,
        device: str,
        clock: Callable[[], float],
        pause: Callable[[], None],
        force: Callable[[int, Tensor], Tensor] | None,
    ) -> None:
        self.outcome, self.device, self.clock = outcome, device, clock
        self.pause, self.force = pause, force
        self.start = 0.0

    def begin(self) -> None:
        """The clock runs from here."""
        wait(self.device)
        self.start = self.clock()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wait(self.device)
        self.outcome.seconds.append(self.clock() - self.start)
        step = len(self.outcome.seconds) - 1
        if step < _LOGITS:
            self.outcome.logits.append(scores.float().cpu())
        self.pause()
        if self.force is not None:
            scores = self.force(step, scores)
        self.begin()
        return scores


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def run_once(
    system: System,
    inputs: dict[str, Any],
    new_tokens: int,
    *,
    pause: Callable[[], None] = lambda: None,
    force: Callable[[int, Tensor], Tensor] | None = None,
    **options: Any,
) -> Outcome:
    """One greedy generate, which the caller's own would be like: nothing is handed to it.

    Args:
        system: What runs.
        inputs: Arguments of generate.
        new_tokens: How many tokens it writes.
        pause: Called after every forward, outside of what is timed.
        force: From a step's number and scores [B, V] to other scores.
        options: Further arguments.
    """
    outcome, model = Outcome(), system.model
    watch = _Watch(outcome, model.device.type, system.clock, pause, force)

    def hold(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        outcome.cache = output[CACHE]
        handle.remove()

    handle = model.register_forward_hook(hold, with_kwargs=True)
    try:
        watch.begin()
        ids = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[watch],
            **options,
            **system.options,
        )
    finally:
        handle.remove()
    outcome.ids = getattr(ids, "sequences", ids)
    return outcome


class _Stopped(Exception):
    """Ends the generate of a race that was given up."""


class _Lane:
    """A generate in a thread of its own, which runs to its next token when it is told to."""

    def __init__(self, run: Callable[[Callable[[], None]], Outcome]) -> None:
        self.outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._stop = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._threads = torch.get_num_threads()
        self._worker = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._worker.start()

    def turn(self) -> None:
        """Run up to the next token, or to the end."""
        self._go.release()
        if not self._back.acquire(timeout=_IMPATIENT):
            raise TimeoutError(f"a step took longer than {_IMPATIENT} seconds")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Give up what is not at its end."""
        self._stop = True
        self._go.release()
        self._worker.join(_IMPATIENT)

    def _work(self, run: Callable[[Callable[[], None]], Outcome]) -> None:
        torch.set_num_threads(self._threads)  # a thread has its own number of them
        try:
            self._wait()
            self.outcome = run(self._pause)
        except BaseException as error:  # raised again where the turn was given
            self._error = error
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._stop:
            raise _Stopped


def race(
    systems: Sequence[System],
    inputs: dict[str, Any],
    new_tokens: int,
    *,
    force: Callable[[int, Tensor], Tensor] | None = None,
    **options: Any,
) -> list[Outcome]:
    """Generates of all systems, of which each writes a token before any writes the next.

    Who begins moves on by one with every token.

    Args:
        systems: What runs.
        inputs: Arguments of generate.
        new_tokens: How many tokens each writes.
        force: As for `run_once`.
        options: Further arguments of generate.
    """

    def lane(system: System) -> _Lane:
        return _Lane(
            lambda pause: run_once(system, inputs, new_tokens, pause=pause, force=force, **options)
        )

    lanes = [lane(system) for system in systems]
    try:
        for step in range(new_tokens + 1):  # the last turn only ends
            for one in rotated(lanes, step):
                one.turn()
    finally:
        for one in lanes:
            one.stop()
    return [one.outcome for one in lanes if one.outcome is not None]


def rotated(items: Sequence[_T], by: int) -> list[_T]:
    """The items from place `by` on, then those before it."""
    at = by % len(items)
    return [*items[at:], *items[:at]]


def whole_runs(
    systems: Sequence[System],
    inputs: dict[str, Any],
    new_tokens: int,
    rounds: int,
    **options: Any,
) -> list[list[Outcome]]:
    """Rounds in which every system runs one whole generate; only the last holds its cache.

    Args:
        systems: What runs.
        inputs: Arguments of generate.
        new_tokens: How many tokens each writes.
        rounds: How often, beside one round before that warms up.
        options: Further arguments of generate.

    Returns:
        Per system, an outcome per round.
    """
    found: dict[str, list[Outcome]] = {system.name: [] for system in systems}
    for turn in range(rounds + 1):
        for system in rotated(systems, turn):
            outcome = run_once(system, inputs, new_tokens, **options)
            if found[system.name]:
                found[system.name][-1].cache = None
            found[system.name].append(outcome)
    return [found[system.name][1:] for system in systems]
