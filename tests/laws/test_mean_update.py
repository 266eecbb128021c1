"""The mean update: what a token adds where it does not run; oracle, training, files."""

from __future__ import annotations

import pytest
import torch
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    assert_close,
    forward,
    generate,
    hashed_scores,
    inputs_of,
)
from oracle_runs import oracle_model, routing_of
from parity_runs import hold_steps
from peft import PeftModel
from router_runs import controller_of, routed, trainee, written_batch

from dare_hf import DareConfig, apply_dare, remove_dare
from dare_hf.calibration import fit_router
from dare_hf.errors import AdapterMismatchError, DareConfigError
from dare_hf.testing import decoder_layers, oracle_forward, tiny_model, written_inputs
from dare_hf.testing.shrink import shrunk_model

MODELS = ("llava", "qwen2_5_vl", "chameleon")


def vectors_for(routers, seed: int = 0) -> list[torch.Tensor]:
    """Random mean updates, large enough to matter, written into the routers."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers:
        router.mean_update.copy_(torch.randn(router.mean_update.shape, generator=generator))
    return [router.mean_update.clone() for router in routers]


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("fields", [{}, {"pruned": "drop"}, {"plan_every": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_compact_execution_is_the_oracle(name, fields, rows):
    fields = {"vision_retention": 0.4, "text_retention": 0.6, **fields}
    plain = oracle_model(name, "sdpa", torch.float32)
    options = {"scorer": SCORER, "schedule": "constant", "hop_delimiters": (), **fields}
    with routed_by(trainee(name), mean_update=True, **options) as model:
        added = vectors_for(controller_of(model).routers)
        inputs = inputs_of(model.get_base_model(), BATCHES[rows])
        span = inputs["input_ids"].shape[1]
        logits = forward(model, inputs).logits
        out = generate(model, inputs)
    routing = routing_of({**fields, "scorer": SCORER})
    routing = type(routing)(**{**vars(routing), "mean_update": added})
    real = inputs["attention_mask"].bool()
    oracle = oracle_forward(plain, inputs, hashed_scores, routing)
    assert_close(logits[real], oracle.logits[real], tolerance=FP32_TOLERANCE, what=name)
    written = written_inputs(plain, inputs, out.sequences[:, :-1])
    oracle = oracle_forward(plain, written, hashed_scores, routing, span=span)
    for step, step_logits in enumerate(out.logits):
        theirs = oracle.logits[:, span - 1 + step].to(step_logits.dtype)
        assert_close(step_logits, theirs, tolerance=FP32_TOLERANCE, what=f"{name} step {step}")


def routed_by(model, **fields):
    """An adapter whose rates are fixed; its routers are not asked."""
    from contextlib import contextmanager

    from peft import get_peft_model

    @contextmanager
    def run():
        wrapped = get_peft_model(model, DareConfig(**fields))
        try:
            yield wrapped
        finally:
            wrapped.unload()
            model.eval()

    return run()


@pytest.mark.parametrize("name", MODELS)
def test_vectors_of_zeros_are_the_plain_form(name):
    inputs = inputs_of(trainee(name), (1,))
    with routed(trainee(name), mean_update=True) as model:
        zeros = forward(model, inputs).logits
        vectors_for(controller_of(model).routers)
        other = forward(model, inputs).logits
    with routed(trainee(name)) as model:
        assert controller_of(model).routers[0].mean_update is None
        plain = forward(model, inputs).logits
    assert torch.equal(zeros, plain)
    assert (other - plain).abs().max() > 0.1


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(
    "fields", [{}, {"pruned": "drop"}, {"score_scaling": "multiply"}, {"plan_every": 2}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_the_training_forward_is_generate_step_by_step(name, fields, rows):
    with routed(trainee(name), mean_update=True, **fields) as model:
        vectors_for(controller_of(model).routers)
        batch, out, span = written_batch(model, rows)
        taught = model(**batch)
    hold_steps(out, taught.logits.detach(), span, what=f"{name}, {fields}")


def test_a_gate_is_pulled_by_what_it_decides():
    """The gradient of a token's gate is that of the mixture of running and passing by."""
    from dare_hf.simulation.layer import _update
    from dare_hf.simulation.simulation import Route

    class Plain:
        multiplies = False

    torch.manual_seed(0)
    hidden, output, vectors = torch.randn(3, 1, 4, 8, dtype=torch.float64)
    run = torch.tensor([[True, False, True, False]])
    gate = run.double().requires_grad_()
    scores = torch.full((1, 4), 0.5, dtype=torch.float64)
    route = Route(run, gate, scores, scores)
    passed = hidden + vectors
    _update(Plain(), route, hidden, passed, output, learns=True).sum().backward()
    assert torch.allclose(gate.grad, (output - passed).sum(-1))


def test_a_running_mean_is_learned_in_training_alone():
    with routed(trainee("llava"), mean_update=True) as model:
        batch, _, _ = written_batch(model)
        model.eval()
        model(**batch)
        routers = controller_of(model).routers
        assert not any(router.mean_update.any() for router in routers)
        model.train()
        seen, hooks = [], []
        for layer in decoder_layers(model.get_base_model()):
            hooks.append(layer.register_forward_hook(lambda *a: None))
            seen.append(_record_inner(layer))
        before = [router.mean_update.clone() for router in routers]
        model(**batch)
        for hook in hooks:
            hook.remove()
        after = [router.mean_update.clone() for router in routers]
    for record, start, now in zip(seen, before, after, strict=True):
        change, modality, wanted = record["change"], record["modality"], record["wanted"]
        for kind in (0, 1):
            mean = change[wanted & (modality == kind)].mean(0)
            assert torch.allclose(now[kind], start[kind].lerp(mean, 0.05), atol=1e-5)


def _record_inner(layer) -> dict:
    """What HF's own layer adds, tapped where DARE calls it."""
    record, state = {}, layer._dare
    inner = state.inner

    def tapped(hidden, *args, **kwargs):
        output = inner(hidden, *args, **kwargs)
        new = output[0] if isinstance(output, tuple) else output
        context = state.controller.context
        record["change"] = (new - hidden).detach()
        record["modality"] = context.modality
        record["wanted"] = ~context.span_and_forced()[1]
        state.inner = inner
        return output

    state.inner = tapped
    return record


def test_fitted_vectors_are_the_means_of_what_layers_add():
    model = tiny_model("llava")
    batches = [inputs_of(model, (1,), seed=seed) for seed in range(3)]
    plain, sums, counts = tiny_model("llava"), None, None
    wrapped = fit_router(
        model,
        batches,
        DareConfig(scorer="router", mean_update=True, prefix_tokens=1),
        max_new_tokens=4,
        generate_kwargs={"do_sample": False},
    )
    found = [router.mean_update for router in controller_of(wrapped).routers]
    with wrapped.disable_adapter():
        for batch in batches:
            full = wrapped.generate(**batch, max_new_tokens=4, do_sample=False)
            inputs = written_inputs(plain, batch, full)
            states = plain(**inputs, output_hidden_states=True, use_cache=False).hidden_states
            modality = modality_with_prefix(plain, inputs)
            for layer in (0, 1):
                change = (states[layer + 1] - states[layer]).detach()
                for kind in (0, 1):
                    mine = modality == kind
                    sums = sums if sums is not None else {}
                    counts = counts if counts is not None else {}
                    key = (layer, kind)
                    sums[key] = sums.get(key, 0) + change[mine].sum(0)
                    counts[key] = counts.get(key, 0) + int(mine.sum())
    for (layer, kind), total in sums.items():
        assert torch.allclose(found[layer][kind], total / counts[layer, kind], atol=1e-4)


def modality_with_prefix(model, inputs) -> torch.Tensor:
    """[B, S] modality, the first real token marked as a pad: it is never pruned."""
    from dare_hf.testing import modality_of

    modality = modality_of(model, inputs).clone()
    for row in range(len(modality)):
        modality[row, (modality[row] >= 0).nonzero()[0]] = -1
    return modality


def test_files_hold_the_vectors_and_say_so(tmp_path):
    inputs = inputs_of(trainee("llava"), (1,))
    with routed(trainee("llava"), mean_update=True) as model:
        vectors_for(controller_of(model).routers)
        wanted = forward(model, inputs).logits
        model.save_pretrained(tmp_path / "with")
    with routed(trainee("llava")) as model:
        model.save_pretrained(tmp_path / "without")
    base = tiny_model("llava")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "with"))
    assert_close(forward(loaded, inputs).logits, wanted, tolerance=1e-5, what="peft")
    loaded.unload()
    apply_dare(base, str(tmp_path / "with"))
    assert_close(forward(base, inputs).logits, wanted, tolerance=1e-5, what="apply_dare")
    remove_dare(base)
    config = tmp_path / "without" / "adapter_config.json"
    config.write_text(config.read_text().replace('"mean_update": "auto"', '"mean_update": true'))
    with pytest.raises(AdapterMismatchError, match="mean_update"):
        apply_dare(base, str(tmp_path / "without"))


def test_means_alone_are_fitted_for_another_scorer(told):
    model, seen = tiny_model("llava"), []
    config = DareConfig(scorer="attention", schedule="ramp", mean_update=True)
    batches = [inputs_of(model, (0,), seed=0)]
    wrapped = fit_router(model, batches, config, max_new_tokens=3, details=seen.append)
    assert all(router.mean_update[0].any() for router in controller_of(wrapped).routers)
    assert (seen[0].explained, seen[0].tried) == ([], {})
    assert not any("rank" in line for line in told)
    wrapped.unload()
    with pytest.raises(DareConfigError, match=r"scorer: .*mean_update"):
        fit_router(model, batches, DareConfig(scorer="attention"))


def test_what_cannot_be_is_refused():
    with pytest.raises(DareConfigError, match=r"mean_update.*auto"):
        DareConfig(mean_update="yes")
    with pytest.raises(DareConfigError, match=r"mean_update.*adapter"):
        apply_dare(tiny_model("llava"), DareConfig(mean_update=True))
    model = shrunk_model("gemma3n")
    with pytest.raises(DareConfigError, match=r"mean_update.*several"):
        fit_router(model, [{}], DareConfig(scorer="router", mean_update=True))
