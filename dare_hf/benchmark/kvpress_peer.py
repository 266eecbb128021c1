"""kvpress beside today's transformers: all that it needs for that is in this file.

kvpress 0.5.5 wants transformers below 5.3. What it reads has since changed its name (the cache) or
is gone (cache positions), so its hook is told both here. Importing it wraps every attention
function of transformers, for presses that prune heads apart; the one raced here does not, and the
others in the race must not pay for it, so the functions are put back.
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dare_hf.benchmark.race import run_once
from dare_hf.benchmark.systems import PRUNED, System, twin
from dare_hf.compat import CACHE
from dare_hf.errors import DareConfigError, DareInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dare_hf.benchmark.systems import Subject

NAME = "kvpress"


@contextmanager
def with_kvpress(
    subject: Subject, systems: Sequence[System], inputs: dict[str, Any], *, wanted: bool
) -> Iterator[list[System]]:
    """The systems, and kvpress's norm of keys at as many keys and values as DARE keeps.

    Args:
        subject: What is run.
        systems: The others; one of them prunes.
        inputs: Arguments of generate, by which the share that DARE keeps is found.
        wanted: Whether to add it.

    Raises:
        DareConfigError: It is not installed.
        DareInputError: Rows are padded, which it does not know.
    """
    if not wanted:
        yield list(systems)
        return
    press = _press()
    if not bool(inputs.get("attention_mask", torch.ones(1)).all()):
        raise DareInputError(f"peer: expected rows of one length, which {NAME} needs; got pads")
    pruned = next(system for system in systems if system.name == PRUNED)
    report = run_once(pruned, inputs, 1, **subject.options).cache.report
    share = report.kv_bytes / report.kv_bytes_baseline
    model = twin(subject.model)
    with press(compression_ratio=1 - share)(model):
        yield [*systems, System(NAME, model, checked=False, clock=subject.clock)]


def _press() -> Any:
    """The class of the press, which reads what this transformers says."""
    if importlib.util.find_spec(NAME) is None:
        raise DareConfigError(
            f"peer: expected {NAME} to be installed; it is not. Install it with "
            "`make bench-peers` and put .venv/peers on PYTHONPATH"
        )
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    knorm = importlib.import_module(NAME).KnormPress
    for name, function in before.items():
        ALL_ATTENTION_FUNCTIONS[name] = function

    class Today(knorm):
        """Its norm of keys."""

        def forward_hook(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            cache = kwargs[CACHE]
            stored = cache.layers[module.layer_idx].keys.shape[2]
            told = {"past_key_values": cache, "cache_position": torch.tensor([stored - 1])}
            return super().forward_hook(module, args, kwargs | told, output)

    return Today
