"""Faults in the middle of a forward, by number: memory that lacks, Ctrl-C between two lines."""

from __future__ import annotations

import copy
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hop_runs import DELIMITER, PRUNED
from laws import SCORER, assert_close, dare, forward, level_inputs, shared_model
from torch.utils._python_dispatch import TorchDispatchMode

import dare_hf
from dare_hf import DareCache
from dare_hf.compat import CACHE

MODELS = ("llava", "qwen2_5_vl", "gemma3")
STATE_TOLERANCE = 1e-5
"""A repeated forward may run in other gemm shapes: a rollback leaves another slab."""


class FailAt(TorchDispatchMode):
    """Raises torch.OutOfMemoryError at the n-th operation that makes a tensor; counts them.

    Args:
        number: Which one, from 0; None counts only.
    """

    def __init__(self, number: int | None = None):
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        if any(r.alias_info is None and "Tensor" in str(r.type) for r in returns):
            self.count += 1
            if self.count - 1 == self.number:
                raise torch.OutOfMemoryError(f"on purpose, in {func}")
        return func(*args, **(kwargs or {}))


def state_of(cache) -> dict[str, Any]:
    """What a cache holds, whatever its physical layout: per layer and row, and the counters."""
    layers, tensors = [], []
    for layer in cache.layers:
        where, ring = layer.positions(), layer.ring
        rows = []
        for row in range(layer.rows):
            real = where[row] >= 0
            rows.append(where[row, real].tolist())
            tensors += [layer.keys[row, :, real], layer.values[row, :, real]]
            tensors.append(layer.scores()[row, real])
        if ring is not None:
            rows.append(ring.positions.tolist())
            tensors.append(ring.query)
        layers.append((layer.seen, layer.kept_host, layer.kept_lengths().tolist(), rows))
    counters, log = cache.hop_counters, cache.log
    told = (counters.ends, counters.compacted, counters.spans, counters.gaps, counters.cuts)
    last = log.last_written(9)
    tail = None if last is None else last.tolist()
    logged = (log.modality.tolist(), log.hop.tolist())
    report = cache.report.to_dict()
    report.pop("seconds")
    return {
        "layers": layers,
        "counters": (*map(list, told), tail),
        "log": logged,
        "bytes": cache.kv_bytes(),
        "report": report,
        "tensors": tensors,
    }


def hold_same(ours, theirs, what: str) -> None:
    """Hold (logits, state) of a repeated forward to those of an undisturbed one."""
    assert_close(ours[0], theirs[0], tolerance=STATE_TOLERANCE, what=f"{what}: logits")
    ours, theirs = dict(ours[1]), dict(theirs[1])
    for left, right in zip(ours.pop("tensors"), theirs.pop("tensors"), strict=True):
        assert_close(left, right, tolerance=STATE_TOLERANCE, what=f"{what}: stored")
    for name in ours:
        assert ours[name] == theirs[name], f"{what}: {name}"


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line of ours, as Ctrl-C does; counts them.

    Args:
        number: Which one, from 0; None counts only.
    """

    HOME = str(Path(dare_hf.__file__).parent)

    def __init__(self, number: int | None = None):
        self.number, self.count = number, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _call(self, frame, event, arg):
        return self._line if frame.f_code.co_filename.startswith(self.HOME) else None

    def _line(self, frame, event, arg):
        if event == "line":
            self.count += 1
            if self.count - 1 == self.number:
                raise KeyboardInterrupt(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return self._line


class Faults:
    """One forward over copies of one cache.

    Args:
        model: A model with DARE.
        cache: The cache before it.
        inputs: The forward's arguments.
    """

    def __init__(self, model, cache, inputs):
        self.model, self.cache, self.inputs = model, cache, inputs
        with FailAt() as counting:
            self.expected = self._finish(copy.deepcopy(cache))
        self.count = counting.count

    def hold_interrupt(self, number: int) -> None:
        """Interrupted before line `number` of ours, the forward is done, or can be repeated."""
        cache, mode = copy.deepcopy(self.cache), InterruptAt(number)
        length = cache.get_seq_length()
        try:
            with mode:
                self._run(cache)
        except KeyboardInterrupt as error:
            what = f"line {number}, {error}"
            if cache.get_seq_length() == length:
                hold_same(self._finish(cache), self.expected, what)
            else:
                # the last counts may not have reached its report
                found, wanted = state_of(cache), dict(self.expected[1])
                found.pop("report"), wanted.pop("report")
                hold_same((self.expected[0], found), (self.expected[0], wanted), f"{what} (done)")
        else:
            # later runs know what the first had to find out, and may be shorter
            assert mode.count <= number, f"line {number} swallowed the interrupt"

    def lines(self) -> int:
        """Lines of ours that the forward runs."""
        with InterruptAt() as counting:
            self._run(copy.deepcopy(self.cache))
        return counting.count

    def _run(self, cache):
        return forward(self.model, self.inputs, **{CACHE: cache}, use_cache=True).logits

    def _finish(self, cache):
        return self._run(cache), state_of(cache)

    def hold(self, number: int) -> None:
        """After a fault at allocation `number` the same forward gives what it would have given."""
        cache, mode = copy.deepcopy(self.cache), FailAt(number)
        try:
            with mode:
                self._run(cache)
        except torch.OutOfMemoryError as error:
            what = f"allocation {number}, {error}"
            hold_same(self._finish(cache), self.expected, what)
        else:
            # what nobody needs (memory given back) may fail without a word
            hold_same((self.expected[0], state_of(cache)), self.expected, f"allocation {number}")


FIELDS = {
    "observed": {"scorer": "attention"},
    "drop": {"scorer": SCORER, "pruned": "drop"},
}
FORWARDS = {
    "prefill": {},
    "injected": {},
    "step": {},
    "boundary": {},
    "capped_prefill": {"max_kv_tokens": 12},
    "capped_boundary": {"max_kv_tokens": 12},
}
"""The forward that fails: its cap. A boundary is a step that begins a hop."""


def words(*columns: int) -> dict:
    """Sampled tokens of two rows."""
    return {"input_ids": torch.tensor([columns, [c + 1 for c in columns]])}


def prepared(model, kind: str):
    """The cache and the arguments of the forward that will fail."""
    inputs, cache = level_inputs(model, (1, 0)), DareCache()
    if kind.endswith("prefill"):
        return cache, inputs

    def run(**step):
        forward(model, step, **{CACHE: cache}, use_cache=True)

    run(**inputs)
    for word in (20, 31, 42):
        run(**words(word))
    run(input_ids=torch.full((2, 1), DELIMITER))
    if kind != "boundary" and kind != "capped_boundary":
        run(**words(50))
    return cache, words(*range(60, 67)) if kind == "injected" else words(70)


def cases(fast: bool):
    for name, fields, kind in itertools.product(MODELS, FIELDS, FORWARDS):
        # both scores are fast, on one model or the other
        usual = (fields == "observed") == (name != "gemma3")
        if usual or not fast:
            yield pytest.param(name, fields, kind, id=f"{name}-{fields}-{kind}")


@contextmanager
def faulty(name: str, fields: str, kind: str):
    """The forward of a case, ready to fail at any of its allocations."""
    config = {**PRUNED, **FIELDS[fields], **FORWARDS[kind], "hop_delimiters": (DELIMITER,)}
    model = shared_model(name)
    with dare(model, **config):
        yield Faults(model, *prepared(model, kind))
