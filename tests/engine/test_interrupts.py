"""Ctrl-C between any two lines of ours: the forward can be repeated, or it is done; runs go on."""

import os
import random
from contextlib import nullcontext

import pytest
from faults import InterruptAt, cases, faulty
from hop_runs import PRUNED
from laws import assert_same_run, dare, everything, forward, generate, inputs_of, shared_model

from dare_hf import DareCache, dare_disabled, last_report
from dare_hf.compat import CACHE

SAMPLE = 4
"""Interrupts of each case in the fast tests, drawn with a fixed seed."""


@pytest.mark.parametrize(("name", "fields", "kind"), list(cases(fast=True)))
def test_an_interrupted_forward_can_be_repeated_or_is_done(name, fields, kind):
    with faulty(name, fields, kind) as faults:
        lines = faults.lines()
        assert lines > 300
        for number in random.Random(name + kind).sample(range(lines), SAMPLE):
            faults.hold_interrupt(number)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "kind"), list(cases(fast=False)))
def test_many_interrupts(name, fields, kind):
    """INTERRUPTS of each of the cases; 14 make 504."""
    with faulty(name, fields, kind) as faults:
        count = int(os.environ.get("INTERRUPTS", "3"))
        for number in random.Random(f"{name}{fields}{kind}").sample(range(faults.lines()), count):
            faults.hold_interrupt(number)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_next_generate_is_as_the_first(name):
    model = shared_model(name)
    inputs = inputs_of(model)
    with dare(model, scorer="attention", **PRUNED):
        first, report = generate(model, inputs), last_report(model)
        with InterruptAt() as counting:
            generate(model, inputs)
        for number in random.Random(name).sample(range(counting.count), 4 * SAMPLE):
            with pytest.raises(KeyboardInterrupt), InterruptAt(number):
                generate(model, inputs)
            again = generate(model, inputs)
            assert_same_run(again, first, tolerance=0.0, what=f"line {number}")
            assert last_report(model).flops == report.flops
            assert last_report(model).kv_bytes == report.kv_bytes


@pytest.mark.parametrize("disabled", [True, False])
def test_what_was_decided_is_done_before_any_forward(disabled):
    """Also one without DARE: it would add columns that the decision knows nothing of."""
    model, cache, served = shared_model("llava"), DareCache(), []
    with dare(model, **everything()):
        forward(model, inputs_of(model), **{CACHE: cache}, use_cache=True)
        length = cache.get_seq_length()
        cache.decide([], lambda one: served.append(one.get_seq_length()))
        word = {"input_ids": inputs_of(model)["input_ids"][:, -1:]}
        with dare_disabled(model) if disabled else nullcontext():
            forward(model, word, **{CACHE: cache}, use_cache=True)
    assert served == [length]
