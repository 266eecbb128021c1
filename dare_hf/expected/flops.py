"""FLOPs of a prefill and of the first sampled token, before any run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dare_hf.errors import DareInputError
from dare_hf.hops.eviction import never_thins
from dare_hf.report.flops import forward_flops, frozen_flops, head_flops, unpruned_flops
from dare_hf.routing.counts import span_budgets
from dare_hf.scoring.base import make_scorer
from dare_hf.scoring.scorer import Scoring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.expected.subject import Subject
    from dare_hf.expected.tokens import HopTokens


@dataclass(frozen=True)
class ExpectedFlops:
    """FLOPs of one row, counted as the report counts them: one multiply-add is two.

    Attributes:
        prefill: Of the prompt, scores and the language-model head on its last token included.
        decode: Of the first sampled token after it.
        plain_prefill: The same of the model without DARE.
        plain_decode: The same of the model without DARE.
    """

    prefill: int
    decode: int
    plain_prefill: int
    plain_decode: int


def expected_flops(subject: Subject, prompt: HopTokens) -> ExpectedFlops:
    """FLOPs of a prompt of one row, from rates and counts alone.

    Args:
        subject: The model, not shapes alone, and the configuration.
        prompt: The prompt.

    Raises:
        DareInputError: Only shapes are known.
    """
    if subject.anatomy is None:
        raise DareInputError("model: expected a model, whose head and width count; got shapes")
    rules, tokens = subject.rules, sum(prompt.span)
    forced = prompt.forced(rules.config.prefix_tokens)
    kept = [rows[0] for rows in rules.ran([0], [prompt.span], [forced], tokens)]
    ran = [sum(kept[source]) for source in subject.sources]
    keys = [tokens] * len(ran) if rules.config.freezes else ran
    scored = _scored(subject, tokens, prompt.span)
    head = _head(subject.anatomy)
    plain = subject.plain()
    return ExpectedFlops(
        prefill=_forward(subject, ran, keys)
        + _frozen(subject, subject.anatomy, ran, tokens)
        + _scores(subject, scored, tokens, ran, keys, prompt.span)
        + head,
        decode=_forward(subject, [1] * len(ran), [n + 1 for n in keys])
        + _scores(subject, _stored(subject), 1, [0] * len(ran), [n + 1 for n in keys])
        + head,
        plain_prefill=unpruned_flops(plain, [tokens], [tokens]) + head,
        plain_decode=unpruned_flops(plain, [1], [tokens + 1]) + head,
    )


def _forward(subject: Subject, queries: Sequence[int], keys: Sequence[int]) -> int:
    return forward_flops(subject.shapes, [[q] for q in queries], [[n] for n in keys])


def _frozen(subject: Subject, anatomy: Anatomy, ran: Sequence[int], tokens: int) -> int:
    """What making keys of tokens that do not run takes, of all tokens of those layers."""
    if not subject.rules.config.freezes:
        return 0
    hidden = anatomy.text_config.hidden_size
    pairs = zip(subject.shapes, ran, strict=True)
    return sum(frozen_flops(shape, hidden, tokens) for shape, own in pairs if own < tokens)


def _head(anatomy: Anatomy) -> int:
    config = anatomy.text_config
    return head_flops(config.hidden_size, getattr(config, "vocab_size", 0), 1)


def _scores(
    subject: Subject,
    layers: Sequence[int],
    tokens: int,
    queries: Sequence[int],
    keys: Sequence[int],
    span: Sequence[int] = (),
) -> int:
    assert subject.anatomy is not None
    hidden = subject.anatomy.text_config.hidden_size
    scorer, rows = make_scorer(subject.rules.config, (None, "")), [span] if span else []
    pairs = [(layer, max(layer - 1, 0)) for layer in layers]
    work = [
        Scoring(subject.shapes, hidden, layer, tokens, [queries[b]], [keys[b]], rows)
        for layer, b in pairs
    ]
    return sum(map(scorer.flops, work))


def _selecting(subject: Subject) -> list[int]:
    """Layers that select for themselves."""
    plans = subject.rules.table.plan_layers
    return [i for i, source in enumerate(subject.sources) if source == i and plans[i] == i]


def _stored(subject: Subject) -> list[int]:
    """Layers that score every token of the prompt, for hops that close later or to multiply by."""
    config, table = subject.rules.config, subject.rules.table
    selecting = _selecting(subject)
    if config.multiplies:
        return selecting
    closes = config.hop_delimiters or config.decode_window or config.max_kv_tokens
    if config.resolved_hop_score != "stored" or not closes:
        return []
    plans = enumerate(table.plan_layers)
    needed = {plan for i, plan in plans if not never_thins(config, table, i)}
    return [i for i in selecting if i in needed]


def _scored(subject: Subject, tokens: int, span: Sequence[int]) -> list[int]:
    """Layers that score the prompt: those that must, and those that choose among its tokens."""
    rules, chosen, begun = subject.rules, [], False
    for layer in _selecting(subject):
        budgets = span_budgets(rules.table, layer, [0], [span])[0]
        begun = budgets != list(span) or (begun and rules.config.drops)
        if begun and tokens < rules.exempt.get(layer, tokens + 1):
            chosen.append(layer)
    return sorted({*_stored(subject), *chosen})
