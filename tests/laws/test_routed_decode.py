"""Routed decode: sampled tokens skip layers by thresholds; oracle, training, speculation, rows."""

from __future__ import annotations

import pytest
import torch
from hop_runs import BY_WORD
from laws import BATCHES, FP32_TOLERANCE, assert_close, generate, inputs_of, rows_of
from oracle_runs import oracle_model
from parity_runs import hold_steps
from router_runs import controller_of, routed, trainee, written_batch
from skipping_runs import skipping

from dare_hf import DareConfig, apply_dare, last_report
from dare_hf.calibration import fit_router, fit_thresholds
from dare_hf.compat import cache_of
from dare_hf.errors import (
    AdapterMismatchError,
    DareConfigError,
    DareInputError,
    DareStateError,
)
from dare_hf.hops.compaction import stored_counts
from dare_hf.testing import (
    OracleRouting,
    collate,
    decoder_layers,
    modality_of,
    oracle_forward,
    tiny_model,
    written_inputs,
)

MODELS = ("llava", "qwen2_5_vl", "chameleon")


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("fields", [{}, {"mean_update": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_compact_execution_is_the_oracle(name, fields, rows):
    """One hop: each step's logits, and what each layer has stored."""
    plain = oracle_model(name, "sdpa", torch.float32)
    with skipping(name, hop_delimiters=(), **fields) as model:
        controller = controller_of(model)
        routers = controller.routers
        if fields:
            for router in routers:
                router.mean_update.copy_(torch.randn(router.mean_update.shape) * 0.5)
        inputs = inputs_of(model.get_base_model(), BATCHES[rows])
        span = inputs["input_ids"].shape[1]
        out = generate(model, inputs, max_new_tokens=10)
        table = controller.table
        routing = OracleRouting(
            rates=[(table.rate(0, i, 1), table.rate(0, i, 0)) for i in range(len(routers))],
            thresholds=[router.thresholds[0].clone() for router in routers],
            mean_update=[router.mean_update.clone() for router in routers] if fields else None,
        )

        def scorer(hidden, modality, *, layer, hop, positions):
            return routers[layer].scores(hidden, modality).detach()

        written = written_inputs(plain, inputs, out.sequences[:, :-1])
        oracle = oracle_forward(plain, written, scorer, routing, span=span)
        skipped = last_report(model).skipped_layers
    for step, step_logits in enumerate(out.logits):
        theirs = oracle.logits[:, span - 1 + step].to(step_logits.dtype)
        assert_close(step_logits, theirs, tolerance=FP32_TOLERANCE, what=f"{name} step {step}")
    kept = torch.stack([keep.sum(1) for keep in oracle.keep])
    assert cache_of(out).kept_lengths().tolist() == kept.tolist()
    real = modality_of(plain, written)[:, span:] >= 0
    gone = [int((real & ~keep[:, span:]).sum()) for keep in oracle.keep]
    assert skipped == gone
    assert any(gone[:-1])
    assert not gone[-1]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(
    "fields",
    [{}, {"hop_budget": "per_hop"}, {"max_kv_tokens": 9}, {"mean_update": True}],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_the_training_forward_is_generate_step_by_step(name, fields, rows):
    with skipping(name, **fields) as model:
        if "mean_update" in fields:
            for router in controller_of(model).routers:
                router.mean_update.copy_(torch.randn(router.mean_update.shape) * 0.5)
        batch, out, span = written_batch(model, rows)
        report = last_report(model)
        model.eval()
        taught = model(**batch)
    assert max(cache_of(out).hops) >= 2
    assert sum(report.skipped_layers) > 3
    assert report.kv_bytes <= report.kv_bytes_predicted
    hold_ledgers(cache_of(out))
    hold_steps(out, taught.logits.detach(), span, what=f"{name}, {fields}")


def hold_ledgers(cache) -> None:
    """What a hop's begin left is known to the token, whatever had skipped before it."""
    ledgers = cache.hop_counters.ledgers
    begun = [ledger.begun for ledger in ledgers]
    held, _ = stored_counts(cache, [hop - 1 for hop in begun])
    for row, ledger in enumerate(ledgers):
        if begun[row] < 2:
            continue
        said = [(layer.least, layer.most) for layer in ledger.layers]
        assert said == [(sum(rows[row]),) * 2 for rows in held]


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_it_is_alone(name):
    with skipping(name) as model:
        base = model.get_base_model()
        rows = rows_of(base, (0, 1, 2))
        together = generate(model, collate(base, rows), max_new_tokens=12)
        for k, row in enumerate(rows):
            alone = generate(model, collate(base, [row]), max_new_tokens=12)
            assert torch.equal(alone.sequences[0, -12:], together.sequences[k, -12:])
            lengths = cache_of(alone).kept_lengths()[:, 0]
            assert torch.equal(lengths, cache_of(together).kept_lengths()[:, k])


@pytest.mark.parametrize("name", MODELS)
def test_speculation_is_token_identical(name):
    with skipping(name, hop_delimiters=BY_WORD["hop_delimiters"]) as model:
        inputs = inputs_of(model.get_base_model(), (1,))
        greedy = generate(model, inputs, max_new_tokens=16)
        looked = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
        ours = generate(model, inputs, max_new_tokens=16, **looked)
    assert torch.equal(greedy.sequences, ours.sequences)
    stored = [cache_of(out).kept_lengths().tolist() for out in (greedy, ours)]
    assert stored[0] == stored[1]


def test_beams_and_a_second_run_leak_nothing():
    with skipping("llava") as model:
        inputs = inputs_of(model.get_base_model(), (1, 1))
        first = generate(model, inputs, max_new_tokens=10)
        generate(model, inputs, max_new_tokens=6, num_beams=3)
        second = generate(model, inputs, max_new_tokens=10)
    assert torch.equal(first.sequences, second.sequences)


def test_a_layer_that_no_row_needs_is_not_run():
    """Only the first of a hop runs where the threshold is 1; the last layer runs all."""
    with skipping("llava", {"low": 1.0, "high": 1.0}, hop_delimiters=()) as model:
        layers, calls = decoder_layers(model.get_base_model()), []
        for index, layer in enumerate(layers):
            inner = layer._dare.inner

            def counted(*args, _inner=inner, _index=index, **kwargs):
                calls.append(_index)
                return _inner(*args, **kwargs)

            layer._dare.inner = counted
        inputs = inputs_of(model.get_base_model(), (1,))
        generate(model, inputs, max_new_tokens=9)
        report = last_report(model)
    # the prompt, the hop's two first tokens, and 6 more that only the last layer runs
    assert [calls.count(i) for i in range(len(layers))] == [3] * (len(layers) - 1) + [9]
    assert report.skipped_layers == [6] * (len(layers) - 1) + [0]
    assert report.flops["decode"] < 0.6 * report.flops_baseline["decode"]
    assert "layer runs skipped by sampled tokens" in str(report)


def test_thresholds_of_zero_are_the_full_decode():
    with routed(trainee("llava"), decode="routed") as model:
        inputs = inputs_of(model.get_base_model(), (1, 2))
        zero = generate(model, inputs, max_new_tokens=10)
        assert not any(last_report(model).skipped_layers)
    with routed(trainee("llava")) as model:
        full = generate(model, inputs, max_new_tokens=10)
    assert torch.equal(zero.sequences, full.sequences)


def test_training_brings_thresholds_to_the_quantiles_of_the_scores():
    with routed(trainee("llava"), decode="routed") as model:
        batch, _, _ = written_batch(model)
        controller = controller_of(model)
        routers = controller.routers
        model.eval()
        model(**batch)
        assert not any(router.thresholds.any() for router in routers)
        controller.threshold_step = 1.0
        with torch.no_grad():
            model(**batch)
        controller.threshold_step = None
        first = [router.thresholds.clone() for router in routers]
        assert all(t.any() for t in first[:-1])
        assert not first[-1].any()  # nobody skips the last layer
        model.train()
        out = model(**batch)
        out.loss.backward()
        moved = [not torch.equal(r.thresholds, f) for r, f in zip(routers, first, strict=True)]
        assert not any(moved[-1:])
        grads = [router.weight.grad for router in routers]
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads[:-1])


def test_a_frozen_adapter_learns_neither_thresholds_nor_means():
    """As beside a LoRA that is trained alone."""
    with skipping("llava", mean_update=True) as model:
        batch, _, _ = written_batch(model)
        routers = controller_of(model).routers
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        before = [(r.thresholds.clone(), r.mean_update.clone()) for r in routers]
        model.train()
        model(**batch)
        after = [(r.thresholds, r.mean_update) for r in routers]
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_quantiles():
    from dare_hf.routing.thresholds import follow_quantiles, limits

    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.9]])
    hop = torch.tensor([[1, 1, 1, 1, 1, 2]])
    kinds = torch.zeros(1, 6, dtype=torch.long)
    wanted = torch.tensor([[True] * 5 + [False]])
    table = torch.full((3, 2), 0.25)
    rates = [[0.5, 0.5], [1.0, 1.0], [0.5, 0.5]]
    follow_quantiles(table, scores, wanted, hop, kinds, rates, 1.0)
    assert torch.allclose(table[0], torch.tensor([0.3, 0.25]))  # no vision token was seen
    assert torch.equal(table[1], torch.zeros(2))  # nothing is skipped at a rate of 1
    assert torch.equal(table[2], torch.full((2,), 0.25))
    assert torch.equal(limits(table, hop, kinds)[0, -1:], table[2, :1])
    follow_quantiles(table, scores + 0.2, wanted, hop, kinds, rates, 0.5)
    assert torch.allclose(table[0, 0], torch.tensor(0.4))


def test_fitted_thresholds_skip_about_what_the_rates_say():

    model = tiny_model("llava")
    batches = [inputs_of(model, (1,), seed=seed) for seed in range(4)]
    config = DareConfig(
        scorer="router",
        schedule="constant",
        vision_retention=0.5,
        text_retention=0.5,
        recent_tokens=0,
        decode="routed",
    )
    wrapped = fit_router(
        model, batches, config, max_new_tokens=24, generate_kwargs={"do_sample": False}
    )
    skipped, sampled = 0, 0
    for batch in batches:
        wrapped.generate(**batch, max_new_tokens=24, do_sample=False)
        counts = last_report(wrapped).skipped_layers
        skipped += sum(counts[:-1])
        sampled += 21 * (len(counts) - 1)  # 23 are processed, 2 of them never skip
    assert 0.25 < skipped / sampled < 0.75


def test_files_and_refusals(tmp_path):
    with skipping("llava") as model:
        inputs = inputs_of(model.get_base_model(), (1,))
        wanted = generate(model, inputs, max_new_tokens=8)
        model.save_pretrained(tmp_path / "routed")
    with routed(trainee("llava")) as model:
        model.save_pretrained(tmp_path / "full")
    base = tiny_model("llava")
    apply_dare(base, str(tmp_path / "routed"))
    assert torch.equal(generate(base, inputs, max_new_tokens=8).sequences, wanted.sequences)
    config = tmp_path / "full" / "adapter_config.json"
    config.write_text(config.read_text().replace('"decode": "full"', '"decode": "routed"'))
    with pytest.raises(AdapterMismatchError, match="thresholds"):
        apply_dare(tiny_model("llava"), str(tmp_path / "full"))
    with pytest.raises(DareConfigError, match=r"decode: .*adapter"):
        apply_dare(tiny_model("llava"), DareConfig(decode="routed"))
    for fields in ({"pruned": "drop"}, {"plan_every": 2}, {"hop_score": "observed"}):
        with pytest.raises(DareConfigError, match=r"decode: .*bypass"), skipping("llava", **fields):
            pass


def test_thresholds_of_an_adapter_that_has_none(tmp_path):
    with routed(trainee("llava")) as model:
        batches = [inputs_of(model.get_base_model(), (1,), seed=seed) for seed in range(3)]
        before = {k: v.clone() for k, v in model.state_dict().items() if "dare_router" in k}
        generate(model, batches[0], max_new_tokens=16)
        assert not last_report(model).skipped_layers
        fit_thresholds(model, batches, max_new_tokens=16, generate_kwargs={"do_sample": False})
        wanted = generate(model, batches[0], max_new_tokens=16)
        assert sum(last_report(model).skipped_layers) > 5
        after = model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
        assert model.peft_config["default"].decode == "routed"
        model.save_pretrained(tmp_path)
    base = tiny_model("llava")
    apply_dare(base, str(tmp_path))
    assert torch.equal(generate(base, batches[0], max_new_tokens=16).sequences, wanted.sequences)
    with pytest.raises(DareStateError, match="peft"):
        fit_thresholds(base, batches)


def test_thresholds_that_cannot_be_fitted_leave_the_adapter():
    with routed(trainee("llava"), pruned="drop") as model:
        inputs = inputs_of(model.get_base_model(), (1,))
        first = generate(model, inputs, max_new_tokens=8)
        with pytest.raises(DareConfigError, match="bypass"):
            fit_thresholds(model, [inputs])
        with pytest.raises(DareInputError, match="batches"):
            fit_thresholds(model, [])
        assert model.peft_config["default"].decode == "full"
        assert torch.equal(generate(model, inputs, max_new_tokens=8).sequences, first.sequences)
