"""Layers that read the keys of another follow it: they run what it runs, and store nothing."""

from dataclasses import replace

import flash_stand_in
import pytest
import torch
from attention_runs import flex, text_attention  # noqa: F401

from dare_hf import DareCache, DareConfig, last_report
from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance.laws import (
    HOPPING,
    PRUNED,
    LawBroken,
    hold_close,
    hops,
    identity,
    oracle,
    padding,
)
from dare_hf.conformance.subject import Subject
from dare_hf.engine.gathering import Turn
from dare_hf.engine.settings import resolve
from dare_hf.errors import DareConfigError
from dare_hf.routing import VISION
from dare_hf.testing.families import FAMILIES
from dare_hf.testing.samples import batch_of

SHARING = ("gemma4", "gemma4_unified", "gemma3n")
OWNERS, LAYERS = 4, 6


@pytest.fixture(scope="module")
def subjects():
    return {name: Subject.of(name) for name in SHARING}


@pytest.mark.parametrize("name", SHARING)
def test_sharing_layers_are_found_with_the_layer_they_read(subjects, name):
    anatomy = locate(subjects[name].model)
    assert anatomy.sources == (0, 1, 2, 3, 2, 3)  # the last sliding one, the last full one


@pytest.mark.parametrize("name", SHARING)
def test_sharing_layers_store_nothing_and_cost_no_bytes(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    with subject.dare(**PRUNED):
        out = subject.generate(batch)
        report = last_report(subject.model)
    cache = cache_of(out)
    kept = cache.kept_lengths()
    assert kept.shape == (LAYERS, 3)
    assert (kept[:OWNERS] > 0).all()
    assert not kept[OWNERS:].any()
    assert cache.get_seq_length(LAYERS - 1) == cache.get_seq_length(0)
    stored = sum(cache.layer(i).token_bytes() * int(kept[i].sum()) for i in range(OWNERS))
    assert report.kv_bytes == report.kv_bytes_predicted == stored
    held = report.retention[0]
    assert [held[4], held[5]] == [held[2], held[3]]


def test_the_baseline_skips_what_transformers_skips(subjects):
    """Gemma 4 runs its sharing layers on the last token of a prompt only, with DARE or without."""
    subject = subjects["gemma4"]
    batch = subject.batches["alone"]
    flops = {}
    with subject.dare(vision_retention=1.0, text_retention=1.0):
        for name, keep in (("whole", 0), ("last", 1)):
            subject.forward(batch, logits_to_keep=keep)
            report = last_report(subject.model)
            assert report.flops["prefill"] == report.flops_baseline["prefill"]
            flops[name] = report.flops["prefill"]
    assert flops["last"] < flops["whole"]


@pytest.mark.parametrize("name", SHARING)
def test_the_last_logits_are_those_of_the_whole_forward(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    with subject.dare(**PRUNED):
        whole = subject.forward(batch)
        for keep in (1, 5):
            last = subject.forward(batch, logits_to_keep=keep)
            hold_close(subject, last, whole[:, -keep:], f"the last {keep}")


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_speculation_is_greedy_with_hops_that_close_inside_a_step(subjects, name, attention):
    subject = subjects[name]
    before = subject.model.config._attn_implementation
    subject.model.set_attn_implementation(attention)
    batch = subject.batches["alone"]
    try:
        with subject.dare(**HOPPING):
            plain = subject.generate(batch, max_new_tokens=12)
            guessed = subject.generate(batch, max_new_tokens=12, prompt_lookup_num_tokens=3)
        assert guessed.sequences.tolist() == plain.sequences.tolist()
    finally:
        subject.model.set_attn_implementation(before)


def test_flash_attention_writes_what_sdpa_writes(subjects, monkeypatch):
    """Its sliding layers keep everything; a full one and the layer that reads its keys do not."""
    flash_stand_in.install(monkeypatch)
    subject = Subject.of("gemma4")
    subject.model.float()
    batch = batch_of(subject.model, subject.rows[:1])
    pairs = [(1.0, 1.0) if i % 2 == 0 else (1.0, 0.6) for i in range(LAYERS)]
    written = {}
    with subject.dare(schedule=pairs):
        written["sdpa"] = subject.forward(batch)
    with text_attention(subject.model, "flash_attention_2"), subject.dare(schedule=pairs):
        written["flash_attention_2"] = subject.forward(batch)
    hold_close(subject, written["flash_attention_2"], written["sdpa"], "flash")


@pytest.mark.filterwarnings("ignore:_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is set")
@pytest.mark.usefixtures("flex")
def test_flex_attention_writes_what_sdpa_writes(subjects):
    subject = subjects["gemma4"]
    batch = subject.batches["padded"]
    logits = {}
    before = subject.model.config._attn_implementation
    try:
        for attention in ("sdpa", "flex_attention"):
            subject.model.set_attn_implementation({"text_config": attention})
            with subject.dare(scorer="attention", text_retention=0.9):
                logits[attention] = subject.forward(batch, logits_to_keep=1)
    finally:
        subject.model.set_attn_implementation(before)
    hold_close(subject, logits["flex_attention"], logits["sdpa"], "flex")


@pytest.mark.parametrize("name", SHARING)
def test_speculation_is_greedy_where_observed_queries_score_hops(subjects, name):
    subject = subjects[name]
    batch = subject.batches["alone"]
    config = DareConfig(
        scorer="attention", schedule="constant", text_retention=0.9, decode_window=3, plan_every=1
    )
    with subject.dare(config):
        plain = subject.generate(batch, max_new_tokens=12)
        guessed = subject.generate(batch, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert guessed.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", SHARING)
def test_beams_are_the_plain_models(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    if name == "gemma3n":  # transformers repeats features picture by picture, where it has a tensor
        batch = batch_of(subject.model, subject.rows[:1])
    plain = subject.generate(batch, num_beams=3)
    with subject.dare(vision_retention=1.0, text_retention=1.0):
        ours = subject.generate(batch, num_beams=3)
    assert ours.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("pruned", ["bypass", "drop"])
def test_the_training_forward_is_generate(subjects, name, pruned):
    """Law 4 where layers share keys: one teacher-forced forward, hops included."""
    subject = subjects[name]
    batch = subject.batches["padded"]
    span = batch.modality.shape[1]
    fields = HOPPING | {"pruned": pruned}
    with subject.dare(**fields):
        out = subject.generate(batch)
        inputs, _ = subject.written(batch, out.sequences[:, :-1])
        labels = inputs["input_ids"].clone()
        labels[:, :span] = -100
        with torch.no_grad():
            taught = subject.model(**inputs, labels=labels).logits
    for step, logits in enumerate(out.logits):
        theirs = taught[:, span - 1 + step].to(logits.dtype)
        hold_close(subject, logits, theirs, f"law 4, {pruned}, step {step}")


@pytest.mark.parametrize("name", SHARING)
def test_a_failed_forward_leaves_the_cache_as_it_was(subjects, name):
    subject = subjects[name]
    batch = subject.batches["alone"]
    last = locate(subject.model).layers[-1]

    def fail(*args):
        raise KeyError("broken")

    with subject.dare(**PRUNED), torch.no_grad():
        cache, whole = DareCache(), DareCache()
        for each in (cache, whole):
            subject.forward(batch, **{CACHE: each}, use_cache=True)
        step = {"input_ids": torch.tensor([[20]]), "use_cache": True}
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="broken"):
            subject.model(**step, **{CACHE: cache})
        handle.remove()
        again = subject.model(**step, **{CACHE: cache}).logits
        assert torch.equal(again, subject.model(**step, **{CACHE: whole}).logits)


def test_a_schedule_is_laid_over_the_layers_that_own_keys(subjects):
    model = subjects["gemma4"].model
    anatomy = locate(model)

    def table(**fields):
        return resolve(model, DareConfig(scorer="random", **fields), anatomy).table

    two = table(schedule="two_stage", vision_retention=0.5, text_retention=1.0)
    own = two.vision[0][:OWNERS]
    assert two.mean(VISION) == pytest.approx(0.5), "the mean is that of all layers"
    assert two.vision[0][OWNERS:] == own[2:]
    assert two.plan_layers == (0, 1, 2, 3, 2, 3)
    pairs = [(0.1 * (i + 1), 1.0) for i in range(LAYERS)]
    assert table(schedule=pairs).vision[0][4] == pytest.approx(0.3)
    with pytest.raises(DareConfigError, match="6 layers"):
        table(schedule=pairs[:OWNERS])
    assert table(schedule="constant", plan_every=4).plan_layers == (0, 0, 0, 0, 0, 0)


def test_a_plan_that_several_layers_reuse_holds_for_sharing_ones(subjects):
    subject = subjects["gemma4"]
    with subject.dare(plan_every=4, **PRUNED):
        plain = subject.generate(subject.batches["padded"])
        alone = subject.generate(subject.batches["alone"])
    row = subject.alone
    assert plain.sequences[row, -7:].tolist() == alone.sequences[0, -7:].tolist()


@pytest.mark.parametrize("mutation", ["shifted", "reversed"])
def test_other_columns_at_a_sharing_layer_are_found(subjects, monkeypatch, mutation):
    """The laws see what a sharing layer reads: shift its columns, and the row breaks."""
    subject = subjects["gemma4"]
    right = Turn.key_view

    def wrong(*args):
        view = right(*args)
        columns = view.columns
        wrong = columns.roll(1, dims=1) if mutation == "shifted" else columns.flip(1)
        return replace(view, columns=wrong)

    monkeypatch.setattr(Turn, "key_view", wrong)
    with pytest.raises((LawBroken, RuntimeError, IndexError)):
        oracle(subject)


@pytest.mark.slow
def test_gemma4_whose_layers_own_their_keys_keeps_the_laws(monkeypatch):
    family = FAMILIES["gemma4"]
    text = {**family.config["text_config"], "num_kv_shared_layers": 0}
    monkeypatch.setitem(
        FAMILIES,
        "gemma4",
        type(family)(**vars(family) | {"config": {**family.config, "text_config": text}}),
    )
    subject = Subject.of("gemma4")
    assert not locate(subject.model).shares
    for law in (identity, oracle, padding, hops):
        law(subject)


def test_a_cache_carried_over_a_turn_goes_on(subjects):
    """The second turn reads what the first one stored, at the sharing layers as well."""
    subject = subjects["gemma4"]
    batch = subject.batches["alone"]
    more = torch.tensor([[21, 22, 23]])
    with subject.dare(**PRUNED), torch.no_grad():
        runs = []
        for _ in range(2):
            cache = DareCache()
            subject.forward(batch, **{CACHE: cache}, use_cache=True)
            runs.append(subject.model(input_ids=more, **{CACHE: cache}, use_cache=True).logits)
        assert torch.equal(*runs)
        cache.crop(-3)
        again = subject.model(input_ids=more, **{CACHE: cache}, use_cache=True).logits
    hold_close(subject, again, runs[0], "after a crop")
