"""Protected text, the share of the newest, whole first layers: what runs is the oracle's."""

from dataclasses import replace

import pytest
import torch
from hop_parity_runs import hold_steps, oracle_rules, steps_for, unpatched
from hop_runs import BY_WORD, closing, held
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    dare,
    forward,
    generate,
    hashed_scores,
    inputs_of,
    prefills_in_chunks,
    shared_model,
)
from peft_runs import adapted

from dare_hf import DareConfig, last_report
from dare_hf.compat import cache_of
from dare_hf.engine.attach import state_of
from dare_hf.forward.modality import special_token_ids
from dare_hf.generation import HopInput, HopLoop
from dare_hf.routing import TEXT, VISION, reference
from dare_hf.testing import hop_forward, modality_of, oracle_forward, tiny_model, written_inputs

LONG_TEXT = {"alone": (30,), "padded": (30, 24, 17)}
RATES = {"vision_retention": 0.5, "text_retention": 0.5, "scorer": "random"}
PROTECTED = {
    "recent_5": {"recent_tokens": 5},
    "drop": {"recent_tokens": 5, "pruned": "drop"},
    "share": {"recent_tokens": 3, "recent_share": 0.5},
    "share_drop": {"recent_share": 0.5, "recent_tokens": 3, "pruned": "drop", "schedule": "ramp"},
    "newest": {"scorer": "recent", "recent_tokens": 0},
    "earliest": {"scorer": "position", "recent_tokens": 4},
    "ramp": {"schedule": "ramp", "recent_tokens": 0, "first_layers_whole": 1},
    "whole": {
        "first_layers_whole": 2,
        "vision_retention": 0.6,
        "text_retention": 0.7,
        "recent_tokens": 2,
    },
    "over": {"recent_tokens": 40},
    "users": {"scorer": SCORER, "recent_tokens": 5, "recent_share": 0.5},
}
FAST = {"share", "share_drop"}


def known_scores(scorer: str):
    """A scorer that looks at no content, by the slow reference, as the oracle calls one."""

    def scores(hidden, modality, *, layer, hop, positions):
        local = ((modality >= 0).cumsum(1) - 1).clamp(min=0)
        if scorer == "random":
            return reference.random_scores(0, layer, local)
        return getattr(reference, f"{scorer}_scores")(local)

    return hashed_scores if scorer == SCORER else scores


def told(model, fields):
    """Say in the oracle's words what a config asks for: scorer, routing, hops."""
    fields = {"hop_decay": 1.0, "hop_delimiters": (), **fields}
    routing, hops = oracle_rules(fields)
    protects = fields["scorer"] != SCORER
    routing = replace(
        routing,
        recent_tokens=fields.get("recent_tokens", 32) if protects else None,
        special_ids=special_token_ids(model.config, model.generation_config),
        recent_share=fields.get("recent_share", 0.0),
    )
    return known_scores(fields["scorer"]), routing, hops


def cases():
    for name in TINY_MODELS:
        for key in PROTECTED:
            for rows in BATCHES:
                fast = name == "llava" or (key in FAST and rows == "padded")
                marks = [] if fast else [pytest.mark.slow]
                yield pytest.param(name, key, rows, marks=marks, id=f"{name}-{key}-{rows}")


@pytest.mark.parametrize(("name", "key", "rows"), list(cases()))
def test_a_protected_prompt_is_the_oracle(name, key, rows):
    model, plain, fields = shared_model(name), unpatched(name), {**RATES, **PROTECTED[key]}
    inputs = inputs_of(model, BATCHES[rows], text=LONG_TEXT[rows])
    with dare(model, **fields):
        logits = forward(model, inputs).logits
        out = generate(model, inputs)
    scorer, routing, _ = told(plain, fields)
    oracle = oracle_forward(plain, inputs, scorer, routing)
    real = inputs["attention_mask"].bool()
    pruned = [(real & ~keep & (modality_of(plain, inputs) == TEXT)).any() for keep in oracle.keep]
    assert any(pruned) or key == "over", "the case prunes no text"
    assert_close(logits[real], oracle.logits[real], tolerance=FP32_TOLERANCE, what=f"{name}, {key}")
    for layer, (ours, keep) in enumerate(zip(held(cache_of(out), 999), oracle.keep, strict=True)):
        assert ours[:, : real.shape[1]].tolist() == keep.tolist(), f"layer {layer}"


@pytest.mark.parametrize("key", ["share", "share_drop", "newest"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_protection_ends_with_the_span(name, key):
    """At compaction only the prefix of each hop is forced; the oracle forces nothing else."""
    model, plain, fields = shared_model(name), unpatched(name), {**RATES, **PROTECTED[key]}
    fields = {**BY_WORD, **fields, "text_retention": 0.3, "max_hops": 3}
    inputs = inputs_of(model, BATCHES["padded"], text=LONG_TEXT["padded"])
    span = inputs["input_ids"].shape[1]
    with dare(model, **fields):
        out = closing(model, inputs, steps_for(inputs))
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    oracle = hop_forward(plain, written, *told(plain, fields), span=span)
    hold_steps(out, oracle.logits, span, what=f"{name}, {key}")
    size = written["input_ids"].shape[1]
    for ours, theirs in zip(held(cache_of(out), size), oracle.held, strict=True):
        assert ours.tolist() == theirs.tolist()


@prefills_in_chunks
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("key", ["recent_5", "share"])
def test_each_chunk_protects_its_own_last_text(key, rows):
    model, fields, chunk = shared_model("llava"), {**RATES, **PROTECTED[key]}, 11
    inputs = inputs_of(model, BATCHES[rows], text=LONG_TEXT[rows])
    with dare(model, **fields):
        out = generate(model, inputs, prefill_chunk_size=chunk, max_new_tokens=1)
    _, routing, _ = told(model, fields)
    modality, ids = modality_of(model, inputs), inputs["input_ids"]
    local = ((modality >= 0).cumsum(1) - 1).clamp(min=0)
    expected = [torch.zeros_like(modality, dtype=torch.bool) for _ in range(4)]
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        kinds = modality[:, part]
        own = torch.zeros_like(kinds, dtype=torch.bool)
        for row, columns in enumerate(own):
            special = [int(token) in routing.special_ids for token in ids[row, part]]
            columns |= torch.tensor(special) & (kinds[row] == TEXT)
        own |= reference.newest(kinds == TEXT, fields["recent_tokens"])
        own |= reference.image_borders(kinds)
        before = (modality[:, :start] >= 0).sum(1)
        own |= reference.forced_tokens(kinds >= 0, prefix_tokens=2, already=before)
        counts = [[int((row == kind).sum()) for kind in (TEXT, VISION)] for row in kinds]
        budgets = torch.tensor([[reference.budget(0.5, n) for n in row] for row in counts])
        share = fields.get("recent_share", 0.0)
        newest = reference.newest_text(kinds, kinds >= 0, own, budgets[:, TEXT], share)
        for layer, mask in enumerate(expected):
            scores = reference.random_scores(0, layer, local[:, part])
            mask[:, part] = reference.keep_mask(
                scores, kinds, kinds >= 0, own, budgets, first=newest
            )
    for ours, keep in zip(held(cache_of(out), ids.shape[1]), expected, strict=True):
        assert ours.tolist() == keep.tolist()


@pytest.mark.parametrize("scorer", ["attention", "random", "key_norm"])
@pytest.mark.parametrize("images", [0, 1])
def test_long_text_is_pruned_to_its_rate_with_an_image_before_it_or_without(scorer, images):
    """Before there was a window, the whole last run of text was kept: nothing was pruned."""
    model = tiny_model("llava", layers=9)
    inputs = inputs_of(model, (images,), text=(200,))
    for schedule in ("safe", "two_stage", "ramp"):
        config = DareConfig(scorer=scorer, schedule=schedule, text_retention=0.7)
        with dare(model, config):
            generate(model, inputs)
            report = last_report(model)
        text = [layer["text"] for layer in report.retention[0]]
        one = 1 / report.tokens["text"][0]
        assert 0.7 - 1e-6 <= sum(text) / 9 <= 0.7 + one, schedule
        assert text[:2] == [1.0, 1.0]
        assert not any("text_retention: asked" in note for note in report.notes)
        assert report.flops["prefill"] < report.flops_baseline["prefill"]


def test_a_router_protects_text_unless_it_was_trained_without():
    model = tiny_model("llava")
    for recent, protects in ((32, True), (1, True), (0, False)):
        wrapped = adapted(model, recent_tokens=recent)
        rules = state_of(wrapped).controller.rules
        assert (rules.protect_text, rules.recent_tokens) == (protects, recent)
        wrapped.unload()


def test_what_an_injected_span_or_a_list_loses_to_protection_is_said():
    model = shared_model("llava")
    inputs = inputs_of(model, (1,), text=(20,))
    with dare(model, schedule=[(1.0, 0.5)] * 4, scorer="random", recent_tokens=20):
        generate(model, inputs)
        (note,) = [note for note in last_report(model).notes if "text rates" in note]
    assert "0.5" in note
    assert "recent_tokens" in note


def test_what_an_injected_text_loses_to_protection_is_said():
    model = shared_model("llava")
    inputs, more = inputs_of(model, (0,), text=(60,)), torch.tensor([[20, 21, 22, 23, 24, 25]])

    def on_hop(hop):
        return HopInput(input_ids=more) if hop.index == 1 else None

    fields = {"scorer": "random", "text_retention": 0.5, "vision_retention": 1.0}
    for recent, said in ((6, True), (0, False)):
        with dare(model, recent_tokens=recent, prefix_tokens=0, decode_window=3, **fields):
            generate(model, inputs, hop_loop=HopLoop(on_hop=on_hop))
            notes = last_report(model).notes
        assert any("of an injected span ran" in note for note in notes) == said
