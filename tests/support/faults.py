"""Faults in the middle of a forward: memory that lacks at one allocation, chosen by its number."""

from __future__ import annotations

import copy
from typing import Any

import torch
from laws import assert_close, forward
from torch.utils._python_dispatch import TorchDispatchMode

from dare_hf.compat import CACHE

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
