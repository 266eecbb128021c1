"""A forward that fails at any allocation can be repeated, with the result it would have had."""

import itertools
import os
import random
from contextlib import contextmanager

import pytest
import torch
from faults import Faults
from hop_runs import DELIMITER, PRUNED
from laws import SCORER, dare, forward, level_inputs, shared_model

from dare_hf import DareCache
from dare_hf.compat import CACHE

MODELS = ("llava", "qwen2_5_vl", "gemma3")
SAMPLE = 5
"""Faults of each case in the fast tests, drawn with a fixed seed."""
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


@pytest.mark.parametrize(("name", "fields", "kind"), list(cases(fast=True)))
def test_a_forward_that_failed_can_be_repeated(name, fields, kind):
    with faulty(name, fields, kind) as faults:
        assert faults.count > 100
        for number in random.Random(name + kind).sample(range(faults.count), SAMPLE):
            faults.hold(number)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "fields", "kind"), list(cases(fast=False)))
def test_a_forward_can_be_repeated_after_many_faults(name, fields, kind):
    with faulty(name, fields, kind) as faults:
        # all of them, some 43,000, take two hours: FAULT_STRIDE=1
        for number in range(0, faults.count, int(os.environ.get("FAULT_STRIDE", "97"))):
            faults.hold(number)
