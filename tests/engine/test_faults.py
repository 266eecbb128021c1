"""A forward that fails at any allocation can be repeated, with the result it would have had."""

import os
import random

import pytest
from faults import cases, faulty

SAMPLE = 5
"""Faults of each case in the fast tests, drawn with a fixed seed."""


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
