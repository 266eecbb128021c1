"""The laws of docs/method.md, section 8, as checks of one tiny model.

Each check raises `LawBroken` with the law, the case and the numbers.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from dare_hf.api import last_report
from dare_hf.architectures.locate import locate
from dare_hf.cache import DareCache
from dare_hf.compat import CACHE, cache_of
from dare_hf.config import DareConfig
from dare_hf.conformance.subject import NEW_TOKENS, SCORER, content_scores
from dare_hf.routing.retention import build_table
from dare_hf.testing.families import family_of
from dare_hf.testing.hop_oracle import HopRules, hop_forward
from dare_hf.testing.oracle import OracleRouting, decoder_layers, masked_forward, oracle_forward
from dare_hf.testing.samples import batch_of, samples

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dare_hf.conformance.subject import Subject
    from dare_hf.testing.samples import Batch, Sample

PRUNED: dict[str, Any] = {"vision_retention": 0.4, "text_retention": 0.7}
HOP_WINDOW = 3
"""Sampled tokens of a hop: with seven, two hops close in the middle."""
HOPPING: dict[str, Any] = {**PRUNED, "decode_window": HOP_WINDOW, "hop_decay": 0.7}

NARROW_TOLERANCE = 2e-4
"""Of float32 logits up to 10: other gemm shapes round at 1e-6 a layer."""
WIDE_TOLERANCE = 1e-5
"""Of float64 ones: norms, rotary angles and routers of experts compute in float32 inside. Hybrids
are held to the other: their linear attention computes chunks and single steps in float32."""
FEWEST_TOKENS = 3
"""Different tokens a sharp model writes; at fewer every identity holds by degeneracy."""


class LawBroken(AssertionError):
    """A law does not hold; the text says which one, where, and by how much."""


def hold(condition: bool, text: str) -> None:
    """Raise `LawBroken` unless the condition holds."""
    if not condition:
        raise LawBroken(text)


def hold_close(subject: Subject, ours: Tensor, theirs: Tensor, what: str) -> None:
    """Hold logits to the tolerance of the model's precision."""
    low = torch.finfo(torch.float32).min
    barred = [side <= low for side in (ours, theirs)]
    hold(torch.equal(*barred), f"{what}: other tokens are barred")
    scale = max(1.0, theirs.masked_fill(barred[1], 0).abs().max().item() / 10)
    wide = subject.wide and not subject.hybrid
    allowed = (WIDE_TOLERANCE if wide else NARROW_TOLERANCE) * scale
    worst = (ours - theirs).masked_fill(barred[0], 0).abs().max().item()
    hold(worst <= allowed, f"{what}: logits differ by {worst:.1e}, allowed {allowed:.0e}")


def hold_run(subject: Subject, ours: Any, theirs: Any, what: str) -> None:
    """Hold two outputs of generate to the same tokens and logits."""
    same = ours.sequences.tolist() == theirs.sequences.tolist()
    hold(same, f"{what}: other tokens")
    for step, (left, right) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        hold_close(subject, left, right, f"{what}, step {step}")


def identity(subject: Subject) -> None:
    """Law 1: at retention 1.0 the model is the one it was."""
    plain = {name: _plain(subject, batch) for name, batch in subject.batches.items()}
    written = {
        token
        for name, (out, _) in plain.items()
        for token in out.sequences[:, subject.batches[name].modality.shape[1] :].flatten().tolist()
    }
    hold(len(written) >= FEWEST_TOKENS, f"the tiny model writes only {sorted(written)}")
    with subject.dare(vision_retention=1.0, text_retention=1.0):
        for name, batch in subject.batches.items():
            what = f"law 1, {name}"
            out, logits = plain[name]
            routed = subject.generate(batch)
            hold(isinstance(cache_of(routed), DareCache), f"{what}: no DareCache was used")
            hold_run(subject, routed, out, what)
            ours = subject.forward(batch)
            hold_close(subject, ours[batch.real], logits[batch.real], f"{what}, bare forward")


def _plain(subject: Subject, batch: Batch) -> tuple[Any, Tensor]:
    return subject.generate(batch), subject.forward(batch)


def routing_of(subject: Subject, pruned: str) -> OracleRouting:
    """The oracle's words for `PRUNED`."""
    sources = locate(subject.model).sources
    layers = len(sources)
    table = build_table(layers, schedule="constant", cut_layer="auto", plan_every=1, **PRUNED)
    rates = [(table.rate(0, layer, 1), table.rate(0, layer, 0)) for layer in range(layers)]
    return OracleRouting(rates=rates, plan_layers=table.plan_layers, sources=sources, pruned=pruned)


def oracle(subject: Subject) -> None:
    """Laws 2 and 6: compact is the masked oracle, a prompt and then step by step; bytes fit."""
    for pruned in ("bypass", "drop"):
        routing = routing_of(subject, pruned)
        for name, batch in subject.batches.items():
            what = f"law 2, {pruned}, {name}"
            with subject.dare(pruned=pruned, **PRUNED):
                logits, out = subject.forward(batch), subject.generate(batch)
                _bytes(subject, cache_of(out), f"law 6, {pruned}, {name}")
            subject.pruned.setdefault(name, out)
            expected = oracle_forward(
                subject.model, batch.inputs, content_scores, routing, modality=batch.modality
            )
            thinned = any((keep != batch.real).any() for keep in expected.keep)
            hold(thinned, f"{what}: the case prunes nothing")
            real = batch.real
            hold_close(subject, logits[real], expected.logits[real], f"{what}, prompt")
            _steps(subject, batch, out, routing, what)


def _steps(subject: Subject, batch: Batch, out: Any, routing: OracleRouting, what: str) -> None:
    inputs, modality = subject.written(batch, out.sequences[:, :-1])
    span = batch.modality.shape[1]
    expected = oracle_forward(
        subject.model, inputs, content_scores, routing, span=span, modality=modality
    )
    for step, ours in enumerate(out.logits):
        theirs = expected.logits[:, span - 1 + step].to(ours.dtype)
        hold_close(subject, ours, theirs, f"{what}, step {step}")
    owners = _owners(subject)
    kept = torch.stack(
        [keep.sum(dim=1) * own for keep, own in zip(expected.keep, owners, strict=True)]
    ).tolist()
    hold(cache_of(out).kept_lengths().tolist() == kept, f"{what}: other counts are stored")


def _owners(subject: Subject) -> list[bool]:
    """Per layer whether it stores keys of its own."""
    return [source == layer for layer, source in enumerate(locate(subject.model).sources)]


def _bytes(subject: Subject, cache: DareCache, what: str) -> None:
    """Law 6: measured bytes are predicted bytes, and follow from the stored tensors' shapes."""
    report = last_report(subject.model)
    measured = cache.kv_bytes()
    hold(report.kv_bytes == measured, f"{what}: report {report.kv_bytes}, cache {measured}")
    predicted = report.kv_bytes_predicted
    hold(predicted == measured, f"{what}: predicted {predicted}, measured {measured}")
    hold(measured < report.kv_bytes_baseline, f"{what}: nothing was saved")


def padding(subject: Subject) -> None:
    """Law 3: a row alone is the row in a batch, also with more padding and in another order."""
    family = family_of(subject.model.config.model_type)
    if family.separate:
        rows = samples(subject.model, family.separate)
        with subject.dare(**PRUNED):
            padded = subject.generate(batch_of(subject.model, rows))
        _rows_alone(subject, "padded", rows, padded, dict.fromkeys(range(len(rows))))
    else:
        rows = subject.rows
        lone = (n for n, row in enumerate(rows) if row.pictures or not family.needs_picture)
        single = {**dict.fromkeys(lone), subject.alone: subject.pruned["alone"]}
        _rows_alone(subject, "padded", rows, subject.pruned["padded"], single)
    if subject.filmed:
        single = dict.fromkeys(n for n, row in enumerate(subject.filmed) if row.clips)
        _rows_alone(subject, "video", subject.filmed, subject.pruned["video"], single)


def _rows_alone(
    subject: Subject, name: str, rows: list[Sample], padded: Any, single: dict[int, Any]
) -> None:
    """Hold rows to what generate writes for them alone.

    Args:
        subject: The model.
        name: What the batch is called.
        rows: Its rows.
        padded: What generate wrote for it.
        single: The rows to run alone, and what generate wrote for them where that is known.
    """
    even = family_of(subject.model.config.model_type).even
    order = [len(rows) - 1, *range(len(rows) - 1)]
    wide = max(len(row.ids) for row in rows) + (0 if even else 5)
    with subject.dare(**PRUNED):
        turned = subject.generate(batch_of(subject.model, [rows[n] for n in order], pad_to=wide))
        alone = {
            n: out or subject.generate(batch_of(subject.model, [rows[n]]))
            for n, out in single.items()
        }
    for case, out, places in ((name, padded, range(len(rows))), (f"{name}, turned", turned, order)):
        for place, row in enumerate(places):
            what = f"law 3, {case}, row {row}"
            other, own = (alone[row], 0) if row in alone else (padded, row)
            written = other.sequences[own, -NEW_TOKENS:].tolist()
            hold(out.sequences[place, -NEW_TOKENS:].tolist() == written, f"{what}: other tokens")
            for step, (left, right) in enumerate(zip(out.logits, other.logits, strict=True)):
                hold_close(subject, left[place], right[own], f"{what}, step {step}")


def hops(subject: Subject) -> None:
    """Laws 2 and 6 with hops that close in the middle: compaction is the oracle of hops."""
    layers = len(decoder_layers(subject.model))
    fixed: dict[str, Any] = {"schedule": "constant", "cut_layer": "auto", "plan_every": 1}
    table = build_table(layers, **fixed, max_hops=8, hop_decay=HOPPING["hop_decay"], **PRUNED)
    rates = [[(table.rate(h, n, 1), table.rate(h, n, 0)) for n in range(layers)] for h in range(8)]
    rules = HopRules(rates=rates, window=HOP_WINDOW)
    routing = routing_of(subject, "bypass")
    for name, batch in subject.batches.items():
        what = f"hops, {name}"
        with subject.dare(**HOPPING):
            out = subject.generate(batch)
            _bytes(subject, cache_of(out), f"law 6, {what}")
        closed = cache_of(out).hops.tolist()
        hold(min(closed) >= 2, f"{what}: hops are {closed}, none has closed")
        inputs, modality = subject.written(batch, out.sequences[:, :-1])
        span = batch.modality.shape[1]
        expected = hop_forward(
            subject.model, inputs, content_scores, routing, rules, span=span, modality=modality
        )
        for step, ours in enumerate(out.logits):
            theirs = expected.logits[:, span - 1 + step].to(ours.dtype)
            hold_close(subject, ours, theirs, f"{what}, step {step}")


def attention_scores(subject: Subject) -> None:
    """Law 2 with the training-free scorer: whatever it keeps, the logits are the oracle's.

    "safe" keeps all text, so there words in the middle are called vision where a model sees no
    images.
    """
    batch = subject.batches["padded"]
    middle = {} if (batch.modality == 1).any() else {"modality_mask": _middle(batch.real)}
    constant = DareConfig(
        schedule="constant", text_retention=0.6, recent_tokens=3, decode_window=HOP_WINDOW
    )
    for config, called in ((constant, {}), (DareConfig.preset("safe"), middle)):
        what = f"law 2, attention scores, {config.schedule}"
        cache = DareCache()
        with subject.dare(config):
            logits = subject.forward(batch, **{CACHE: cache}, **called, use_cache=True)
            subject.generate(batch, **called)
            report = last_report(subject.model)
        hold(report.kv_bytes_predicted == report.kv_bytes, f"{what}: other bytes than predicted")
        sources = locate(subject.model).sources
        keep = [_stored(cache, source, batch.real) for source in sources]
        hold(not all(mask.equal(batch.real) for mask in keep), f"{what}: prunes nothing")
        expected = masked_forward(subject.model, batch.inputs, keep)
        hold_close(subject, logits[batch.real], expected[batch.real], what)


def _middle(real: Tensor) -> Tensor:
    """Bool[B, S]: each row's real tokens but for the first and the last few."""
    place = real.cumsum(dim=1)
    return real & (place > 3) & (place <= place[:, -1:] - 3)


def _stored(cache: DareCache, layer: int, real: Tensor) -> Tensor:
    mask = torch.zeros_like(real)
    for row, columns in zip(mask, cache.layer(layer).positions(), strict=True):
        row[columns[columns >= 0]] = True
    return mask & real


RUN_STATE = {"rope_deltas"}
"""What transformers itself writes on a module in every run."""


def removal(subject: Subject) -> None:
    """Law 7: after remove_dare each module, config and output is what it was."""
    model, batch = subject.model, subject.batches["padded"]
    with torch.no_grad():
        model(**batch.inputs, output_hidden_states=True)  # lets HF install its capture hooks
    plain = subject.forward(batch)
    before = snapshot(model)
    with subject.dare(DareConfig(scorer="attention")):
        subject.generate(batch)
    with subject.dare(DareConfig(scorer=SCORER)):
        subject.forward(batch)
    after = snapshot(model)
    for key, value in before.items():
        hold(after.get(key) == value, f"law 7: {key} is not what it was")
    hold(set(after) == set(before), f"law 7: left behind {sorted(set(after) - set(before))[:3]}")
    hold(torch.equal(subject.forward(batch), plain), "law 7: other logits after remove_dare")


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that apply_dare could have changed, comparable by identity or value."""
    found: dict[str, Any] = {"generate": model.generate.__func__}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in RUN_STATE:
                continue
            same = [(n, id(e)) for n, e in value.items()] if isinstance(value, dict) else id(value)
            found[f"{name}.{key}"] = same
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            found[f"{name} attention"] = module.config._attn_implementation
    for name in ("config", "generation_config"):
        found[name] = copy.deepcopy(vars(getattr(model, name)))
    return found


CHECKS = (identity, oracle, padding, hops, attention_scores, removal)
"""In the order they run; the first that breaks names the row's failure."""
