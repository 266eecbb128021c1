"""What a training forward differentiates: finite differences, reach, and the frozen backbone."""

import copy

import pytest
import torch
from laws import FP32_TOLERANCE, TINY_MODELS, assert_close
from router_runs import controller_of, routed, trainee, written_batch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dare_hf.engine import routed_layer
from dare_hf.routing import gates
from dare_hf.routing.scores import Softmax
from dare_hf.simulation.damping import damped, mark_closed
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss

STEP = 1e-5
FD_TOLERANCE = 1e-5
"""Relative, of central differences in float64."""


class Constants:
    """`gates.passed` with its constants held fast: the function whose gradient a backward gives.

    ``x - stopgrad(x)`` is 0 wherever it is evaluated. The first forward takes down each stopped
    value; the ones after it subtract those, so that they move when the parameters do.
    """

    def __init__(self):
        self.values, self.turn = [], None

    def __call__(self, x):
        if self.turn is None:
            self.values.append(x.detach().clone())
            return x - x.detach()
        self.turn += 1
        return x - self.values[self.turn - 1]


@pytest.fixture
def exact_norms(monkeypatch):
    """Llama's norm computes in float32; differences of 1e-5 need more."""

    def forward(self, hidden):
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden * scale

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def doubled(model):
    """Routers in float64, rates included."""
    routers = controller_of(model).routers
    for router in routers:
        router.double()
        rates = lambda router=router: torch.sigmoid(router.rate_logits)  # noqa: E731
        object.__setattr__(router, "rates", rates)
    return routers


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pruned": "drop"},
        {"hop_budget": "per_hop", "pruned": "drop"},
        pytest.param({"selector": "gumbel"}, marks=pytest.mark.slow),
        pytest.param({"plan_every": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_are_finite_differences(fields, exact_norms, monkeypatch):
    """Of any function of the logits, to weights, biases and rates, with the selection held fast.

    The gates' floor is raised: a closed gate's logarithm is smooth at 0 then, and nothing else
    changes. What is differentiated are the gates of the mask, those of the updates and the scaling;
    the damping of closed gates, which is no derivative, is held to its own law below.
    """
    monkeypatch.setattr(gates, "FLOOR", 1e-2)
    monkeypatch.setattr(gates, "passed", constants := Constants())
    monkeypatch.setattr(routed_layer, "damped", lambda mask, tensors, scaling: mask)
    model = tiny_model("llava", layers=3, dtype=torch.float64)
    with routed(model, **fields) as wrapped:
        batch, _, span = written_batch(wrapped, "alone", max_new_tokens=14)
        routers = doubled(wrapped)
        weights = torch.randn(
            wrapped(**batch).logits[:, span:].shape,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float64,
        )

        def value():
            return (wrapped(**batch).logits[:, span:] * weights).mean() * 100

        constants.values.clear()
        value().backward()
        compared = 0
        for index, router in enumerate(routers):
            for name, parameter in router.named_parameters():
                if parameter.grad is None:  # a layer that shares a plan asks no router
                    assert "plan_every" in fields
                    continue
                generator = torch.Generator().manual_seed(index)
                way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                expected = (parameter.grad * way).sum().item()
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        parameter += sign * STEP * way
                        constants.turn = 0
                    ends.append(value().item())
                    with torch.no_grad():
                        parameter -= sign * STEP * way
                found = (ends[0] - ends[1]) / (2 * STEP)
                error = abs(found - expected) / max(abs(expected), 1.0)
                assert error < FD_TOLERANCE, f"layer {index}, {name}: {found} != {expected}"
                compared += abs(expected) > 1e-3
    # deep in a dropping model a budget may exceed the survivors: nothing moves it then
    assert compared >= (5 if "plan_every" in fields else 8)


@pytest.mark.parametrize("sharpness", [1.0, 5.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_closed_gate_says_what_opening_its_key_would_change(sharpness, softcap, sinks):
    """Per head: attention with the key less attention without it, in the loss's direction."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = sharpness * draw(1, 4, 6, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    toward = draw(1, 4, 6, 8)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    closed = torch.zeros_like(causal)
    columns = (0, 0, 1, 2, 1, 3)
    for row in range(2, 6):
        closed[0, 0, row, columns[row]] = True

    sink = draw(4) if sinks else None
    whole_key, whole_value = (part.repeat_interleave(2, dim=1) for part in (key, value))

    def attend(mask):
        logits = query @ whole_key.transpose(-1, -2) * 8**-0.5
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        weights = torch.exp(logits + mask)
        taken = 0 if sink is None else torch.exp(sink)[:, None, None]
        return weights / (weights.sum(-1, keepdim=True) + taken) @ whole_value

    barred = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~causal, -torch.inf)
    soft = torch.zeros(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    gate = gates.straight_through(~closed, soft)
    mask = mark_closed(barred + gates.log_gates(gate), closed)
    rules = Softmax(8**-0.5, softcap=softcap, sinks=sink)
    used = damped(mask, (query, key, value), rules)
    (attend(used) * toward).sum().backward()
    hidden = barred.masked_fill(closed, -torch.inf)
    without = (attend(hidden) * toward).sum()
    torch.testing.assert_close((attend(used.detach()) * toward).sum(), without)
    for row in range(2, 6):
        opened = hidden.clone()
        opened[0, 0, row, columns[row]] = 0
        change = (attend(opened) * toward).sum() - without
        torch.testing.assert_close(soft.grad[0, 0, row, columns[row]], change, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_layer_learns_and_the_backbone_stays(name):
    model = trainee(name)
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)
        routers = controller_of(wrapped).routers
        layers = controller_of(wrapped).anatomy.layers
        slides = [getattr(layer.self_attn, "sliding_window", None) is not None for layer in layers]
        before = {k: v.clone() for k, v in model.state_dict().items() if "dare_" not in k}
        learned = {id(p) for router in routers for p in router.parameters()}
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        assert {id(p) for p in trained} == learned
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        wrapped.train()
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(**batch).loss.backward()
            for index, router in enumerate(routers):
                for key, parameter in router.named_parameters():
                    grad = parameter.grad
                    where = f"{name}, layer {index}, {key}"
                    assert grad.isfinite().all(), where
                    if key == "rate_logits":  # of hops 0 and 1, of 2 and of 3
                        # what later hops let go may lie beyond a sliding window anyhow
                        grad = grad[[0]] if slides[index] else grad[[0, 2, 3]]
                    assert (grad.abs().amax(-1) > 0).all(), where
            optimizer.step()
        after = {k: v for k, v in model.state_dict().items() if "dare_" not in k}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("fields", [{}, {"selector": "gumbel"}], ids=str)
def test_gradient_checkpointing_changes_nothing(fields):
    model = tiny_model("llava")
    with routed(model, **fields) as wrapped:
        batch, _, _ = written_batch(wrapped)
        found = []
        for checkpointing in (False, True):
            wrapped.train()
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            loss = wrapped(**batch).loss + auxiliary_loss(wrapped)[0]
            loss.backward()
            parameters = [p for p in wrapped.parameters() if p.requires_grad]
            found.append([loss.detach(), *[p.grad.clone() for p in parameters]])
            wrapped.zero_grad()
        model.activation_checkpointing_disable()
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, plain)


def test_eager_and_sdpa_have_the_same_gradients():
    found = []
    for attention in ("sdpa", "eager"):
        with routed(trainee("llava", attention)) as wrapped:
            batch, _, _ = written_batch(wrapped)
            loss = wrapped(**batch).loss
            loss.backward()
            found.append([p.grad.clone() for p in wrapped.parameters() if p.requires_grad])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_bf16_trains():
    """Autocast and a bfloat16 model: finite gradients along those of float32."""
    model = tiny_model("llava")
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)

        def gradient():
            wrapped.zero_grad()
            (wrapped(**batch).loss + auxiliary_loss(wrapped)[0]).backward()
            grads = [p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]
            return torch.cat(grads).float()

        full = gradient()
        with torch.autocast("cpu", torch.bfloat16):
            cast = gradient()
        model.to(torch.bfloat16)
        for router in controller_of(wrapped).routers:
            router.float()
        low = gradient()
    for name, grad in (("autocast", cast), ("bfloat16", low)):
        assert grad.isfinite().all(), name
        # sharp tiny models amplify 8 bits of mantissa over their layers; the direction remains
        assert torch.cosine_similarity(full, grad, dim=0) > 0.5, name


def test_a_lora_adapter_beside_routers_gets_exact_gradients():
    """Of values: with routers frozen, the backbone's gradients are those of the pruned model."""
    model = tiny_model("llava")
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)
        for router in controller_of(wrapped).routers:
            router.requires_grad_(False)
        layer = model.model.language_model.layers[1].mlp.down_proj
        layer.requires_grad_(True)
        wrapped(**batch).loss.backward()
        weight, ways = layer.weight, torch.randn_like(layer.weight)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-3 * ways
                ends.append(wrapped(**batch).loss.item())
                weight -= sign * 1e-3 * ways
        found, expected = (ends[0] - ends[1]) / 2e-3, (weight.grad * ways).sum().item()
        layer.requires_grad_(False)
    assert found == pytest.approx(expected, rel=0.05)


def test_frozen_routers_only_prune():
    """No parameter of a router wants a gradient: the forward is the hard one, and has no soft."""
    with routed(trainee("llava")) as wrapped:
        batch, _, _ = written_batch(wrapped)
        learning = wrapped(**batch).logits.detach()
        for router in controller_of(wrapped).routers:
            router.requires_grad_(False)
        frozen = wrapped(**batch).logits
        assert not frozen.requires_grad
    assert_close(frozen, learning, tolerance=FP32_TOLERANCE, what="frozen")


def test_gumbel_noise_moves_the_selection_in_training_only():
    model = tiny_model("llava")
    with routed(model, selector="gumbel") as wrapped, torch.no_grad():
        batch, _, _ = written_batch(wrapped)
        evaluated = [wrapped(**batch).logits for _ in range(2)]
        wrapped.train()
        torch.manual_seed(0)
        drawn = [wrapped(**batch).logits for _ in range(2)]
        torch.manual_seed(0)
        again = wrapped(**batch).logits
    assert torch.equal(*evaluated)
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0], again)
    assert not torch.equal(drawn[0], evaluated[0])


def test_nothing_of_a_step_outlives_the_next():
    """The record of a forward goes when the next one comes; a deepcopy has none."""
    with routed(tiny_model("llava")) as wrapped:
        batch, _, _ = written_batch(wrapped)
        wrapped(**batch)
        controller = controller_of(wrapped)
        first = controller.record
        assert copy.deepcopy(controller).record is None
        wrapped(**batch)
        assert controller.record is not first
        assert len(controller._recompute) <= 2
