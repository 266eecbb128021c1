"""No time without right tokens: what a timed run wrote is held against the masked oracle.

The oracle runs the plain model at full size with masks over what the run says it kept, and judges
that choice by the scores (dare_hf.testing). A run that fails is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.benchmark.race import run_once
from dare_hf.benchmark.random_llava import IMAGE_ID
from dare_hf.benchmark.systems import POOLED
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.routing.kinds import PAD, TEXT, VISION
from dare_hf.testing import HopRules, OracleRouting, hop_forward, written_inputs
from dare_hf.testing.given_keep import GivenRun, given_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from dare_hf.benchmark.race import Outcome
    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import Subject, System

_TAIL = 6  # times the mean error, which the errors of a whole vocabulary stay below
_SHORT = 5  # tokens of an answer that is only checked
_HOP_TOKENS, _HOP_SHORT = 160, 14  # the same with hops, of which three close

# Mean square root of what logits are off, as a share of their spread, and scores in [0, 1]: kernels
# of other shapes round otherwise at every layer.
_LOGITS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.03}
_SCORES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def checked(
    subject: Subject,
    systems: Sequence[System],
    setting: Setting,
    inputs: dict[str, Any],
    outcomes: Sequence[Outcome],
) -> list[str]:
    """Hold timed runs against the oracle, or, where they are too long, shorter ones like them.

    Args:
        subject: What was run.
        systems: How.
        setting: At which size.
        inputs: Arguments of generate.
        outcomes: What came of it, a run of each system.

    Returns:
        By system what held it, as `verify` says; "... at N tokens" where those were shorter.

    Raises:
        DareStateError: A run is wrong.
    """
    if inputs["input_ids"].numel() <= setting.check_tokens:
        pairs = zip(systems, outcomes, strict=True)
        return [verify(subject, system, inputs, outcome) for system, outcome in pairs]
    less = replace(
        setting,
        tokens=min(setting.tokens, max(setting.check_tokens // 4, 20)),
        batch=min(setting.batch, 2),
    )
    given = subject.inputs(less)
    at = given["input_ids"].shape[1]
    held = []
    for system in systems:
        outcome = run_once(system, given, _SHORT, **subject.options)
        how = verify(subject, system, given, outcome)
        held.append(f"{how} at {at} tokens" if system.checked else how)
    return held


def verify(subject: Subject, system: System, inputs: dict[str, Any], outcome: Outcome) -> str:
    """Hold a run against the oracle.

    Args:
        subject: What was run.
        system: How.
        inputs: Arguments of generate.
        outcome: What came of it.

    Returns:
        "oracle"; "oracle of what is kept" where it could not judge the choice; "no oracle" of a
        system that it does not know.

    Raises:
        DareStateError: A token or a logit is wrong, or other tokens were kept than asked for.
        DareInputError: The run has not ended.
    """
    if not system.checked:
        return "no oracle"
    if outcome.ids is None:
        raise DareInputError("outcome: expected a run that has ended; got one without tokens")
    span = inputs["input_ids"].shape[1]
    steps = outcome.ids.shape[1] - span
    written = written_inputs(subject.model, inputs, outcome.ids[:, :-1])
    given = _kept(subject, system, inputs, outcome, span + steps - 1)
    with _masks(subject.model):
        run = given_forward(
            subject.model, written, given, steps, _choice(subject, system, inputs, given)
        )
    if run.miscounted:
        layer, row, kind, kept, wanted = run.miscounted[0]
        raise _wrong(
            system,
            f"layer {layer}, row {row} to keep {wanted} {('text', 'vision')[kind]} tokens",
            f"{kept}",
        )
    most = _SCORES[subject.model.dtype]
    if run.farthest > most:
        raise _wrong(
            system,
            f"no token left out whose score is more than {most} above one kept",
            f"{run.farthest:.3g}",
        )
    _compare(subject, system, outcome, run, span)
    return "oracle of what is kept" if system.rates and subject.score is None else "oracle"


def verify_hops(
    subject: Subject,
    systems: Sequence[System],
    setting: Setting,
    force: Callable[[int, Tensor], Tensor],
    delimiters: tuple[int, ...],
) -> list[str]:
    """Hold a short run with several hops against the oracle that knows hops.

    Args:
        subject: What is run.
        systems: How.
        setting: At which size; fewer tokens are run here.
        force: Makes hops close, as for `run_once`.
        delimiters: What closes them.

    Returns:
        By system what held it.

    Raises:
        DareStateError: A run is wrong.
    """
    less = replace(setting, tokens=min(setting.tokens, _HOP_TOKENS), batch=1)
    inputs = subject.inputs(less)
    span, held = inputs["input_ids"].shape[1], []
    for system in systems:
        outcome = run_once(system, inputs, _HOP_SHORT, force=force, **subject.options)
        if subject.score is None or not system.checked:
            held.append("no oracle")
            continue
        assert outcome.ids is not None
        written = written_inputs(subject.model, inputs, outcome.ids[:, :-1])
        modality = _modality(inputs, span + _HOP_SHORT - 1)
        layers = subject.model.config.get_text_config().num_hidden_layers
        rates = [system.rates or (1.0, 1.0)] * layers
        rules = HopRules(
            rates=[rates],
            delimiters=[(one,) for one in delimiters] if system.rates else [],
            pooled=system.name == POOLED,
        )
        run = hop_forward(
            subject.model,
            written,
            _on_cpu(subject.score),
            OracleRouting(rates=rates),
            rules,
            span=span,
            modality=modality,
        )
        _compare_logits(subject, system, outcome, run.logits[:, span - 1 :])
        held.append(f"oracle at {span} tokens")
    return held


def _compare(subject: Subject, system: System, outcome: Outcome, run: GivenRun, span: int) -> None:
    """Logits of the first steps, and every token."""
    assert outcome.ids is not None
    room = _compare_logits(subject, system, outcome, run.logits)
    wanted = run.logits.float().cpu()
    suppressed = subject.options.get("suppress_tokens") or []
    wanted[..., suppressed] = -torch.inf
    best = wanted.amax(-1)
    told = wanted.gather(-1, outcome.ids[:, span:].cpu()[..., None])[..., 0]
    worse, most = (best - told).amax(0), _TAIL * room
    if not bool((worse <= most).all()):
        step = int((worse > most).nonzero()[0])
        raise _wrong(
            system,
            f"token {step} to be one of the oracle's most likely, within {most:.3g}",
            f"one {float(worse[step]):.3g} below",
        )


def _compare_logits(subject: Subject, system: System, outcome: Outcome, logits: Tensor) -> float:
    """Those of the first steps, against [B, steps, V]; what they may differ by."""
    wanted = logits.float().cpu()
    room = _LOGITS[subject.model.dtype] * float(wanted.std())
    for step, ours in enumerate(outcome.logits):
        allowed = ours.isfinite() | ours.isnan()
        off = float((ours - wanted[:, step])[allowed].square().mean().sqrt())
        if not off <= room:  # a NaN is wrong too
            raise _wrong(system, f"logits of token {step} within {room:.3g}", f"{off:.3g}")
    return room


def _wrong(system: System, expected: str, got: str) -> DareStateError:
    return DareStateError(
        f"bench: {system.name}: expected {expected}, as the masked oracle has it; got {got}. "
        "No time is told of a run that is wrong; please report it with this command"
    )


def _kept(
    subject: Subject, system: System, inputs: dict[str, Any], outcome: Outcome, columns: int
) -> list[Tensor]:
    """Per layer, Bool[B, columns]: the tokens in the cache; without DARE, every real one."""
    ids = inputs["input_ids"]
    if system.rates is None:
        real = torch.ones(len(ids), columns, dtype=torch.bool, device=ids.device)
        if (mask := inputs.get("attention_mask")) is not None:
            real[:, : mask.shape[1]] = mask.bool()
        return [real] * subject.model.config.get_text_config().num_hidden_layers
    kept = []
    for layer in outcome.cache.stored:
        where = layer.positions()
        one = torch.zeros(len(where), columns + 1, dtype=torch.bool, device=where.device)
        kept.append(one.scatter(1, where % (columns + 1), True)[:, :columns])
    return kept


def _choice(
    subject: Subject, system: System, inputs: dict[str, Any], given: list[Tensor]
) -> tuple[Any, OracleRouting, Tensor, int] | None:
    """By what the oracle judges which tokens were kept."""
    score = subject.score
    if score is None or system.rates is None:
        return None
    routing = OracleRouting(rates=[system.rates] * len(given))
    modality = _modality(inputs, given[0].shape[1])
    return _on_cpu(score), routing, modality, inputs["input_ids"].shape[1]


def _modality(inputs: dict[str, Any], columns: int) -> Tensor:
    """Long[B, columns] of the random prompt and what was written after it, on the CPU."""
    ids = inputs["input_ids"].cpu()
    modality = torch.where(ids == IMAGE_ID, VISION, TEXT)
    if (mask := inputs.get("attention_mask")) is not None:
        modality = modality.masked_fill(mask.cpu() == 0, PAD)
    return torch.nn.functional.pad(modality, (0, columns - ids.shape[1]), value=TEXT)


def _on_cpu(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scorer for the oracle's loops, which run on the CPU."""

    def scores(hidden: Tensor, modality: Tensor, **facts: Any) -> Tensor:
        facts = {k: v.to(hidden.device) if k != "layer" else v for k, v in facts.items()}
        return score(hidden, modality.to(hidden.device), **facts).cpu()

    return scores


@contextmanager
def _masks(model: Any) -> Iterator[None]:
    """With attention that takes the oracle's mask; flash kernels take none."""
    before = model.config.get_text_config()._attn_implementation
    if before in ("sdpa", "eager"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
