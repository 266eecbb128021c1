"""A forward over written text that is told its prompt is the run that wrote it (parity law)."""

import copy

import pytest
import torch
from laws import SCORER, dare, generate, inputs_of, shared_model
from peft_runs import adapted
from transformers import LogitsProcessor
from transformers.generation import LogitsProcessorList

from dare_hf import DareCache, DareConfig, dare_disabled, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareInputError
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss

NAMES = ("llava", "gemma3", "qwen2_5_vl", "chameleon")
STEPS = 12
PRUNED = {"vision_retention": 0.4, "text_retention": 0.6, "hop_decay": 0.5}
CONFIGS = {
    "safe": DareConfig(vision_retention=0.3),
    "function": DareConfig(
        scorer=SCORER, schedule="constant", hop_delimiters=tuple(range(10, 40)), **PRUNED
    ),
    "capped": DareConfig(schedule="constant", decode_window=4, max_kv_tokens=14, **PRUNED),
    "drop": DareConfig(
        scorer=SCORER, schedule="two_stage", pruned="drop", hop_delimiters=((20,), (30,)), **PRUNED
    ),
}
TOLERANCE = 5e-5
"""RMSNorm and RoPE compute in float32 inside a float64 model, over up to 80 tokens here."""


def written(inputs, sequences, cut=None):
    """Return generate's text as a forward's arguments; row i ends `cut[i]` tokens early."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    whole = copy.deepcopy(inputs)
    for name, value in inputs.items():
        if getattr(value, "shape", None) == inputs["input_ids"].shape:
            whole[name] = torch.cat([value, value.new_zeros(len(value), new)], dim=1)
    whole["input_ids"] = sequences.clone()
    whole["attention_mask"][:, -new:] = 1
    for row, count in enumerate(cut or ()):
        if count:
            whole["attention_mask"][row, -count:] = 0
            whole["input_ids"][row, -count:] = 70
    return whole


def lengths(inputs):
    return inputs["attention_mask"].sum(1)


def assert_parity(found, out, cut, what):
    """Hold the logits of a forward at sampled places to those of the steps."""
    for step, expected in enumerate(out.logits):
        rows = [row for row, count in enumerate(cut) if step < STEPS - count]
        ours = found[rows, found.shape[1] - STEPS - 1 + step]
        barred = expected[rows] <= torch.finfo(torch.float32).min
        worst = (ours - expected[rows]).masked_fill(barred, 0).abs().max().item()
        assert worst <= TOLERANCE, f"{what}: step {step} differs by {worst:.1e}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
def test_parity_with_the_run_that_wrote_it(name, config):
    model = shared_model(name, dtype=torch.float64)
    for images, cut in (((3,), (0,)), ((0, 1, 3), (3, 0, 7))):
        inputs = inputs_of(model, images, text=40)
        with dare(model, CONFIGS[config]):
            out = generate(model, inputs, max_new_tokens=STEPS)
            expected = last_report(model)
            whole, told = written(inputs, out.sequences, cut), lengths(inputs)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    again = model(**copy.deepcopy(whole), prompt_length=told, use_cache=False)
                assert_parity(again.logits.detach(), out, cut, f"{name}, {config}")
            report = last_report(model)
            prompt = model(**copy.deepcopy(whole), use_cache=False).logits
            gap = (prompt - again.logits)[:, -STEPS:].detach().abs().max()
            assert config == "safe" or gap > 100 * TOLERANCE, "all as a prompt is the same"
            if not any(cut):
                number = int(told[0])
                same = model(**copy.deepcopy(whole), prompt_length=number, use_cache=False)
                assert same.logits.equal(again.logits)
                assert report.retention[0] == expected.retention[0]


@pytest.mark.parametrize("name", NAMES[:2])
def test_log_probabilities_as_trainers_take_them(name):
    model = tiny_model(name, layers=6)
    inputs = inputs_of(model, (3,), text=50)
    with dare(model, DareConfig()), torch.no_grad():
        out = generate(model, inputs, max_new_tokens=STEPS)
        whole, told = written(inputs, out.sequences), inputs["input_ids"].shape[1]
        new = out.sequences[:, -STEPS:, None]
        steps = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, new)
        for length, low, high in ((told, 0, 1e-4), (None, 1e-2, 100)):
            logits = model(**copy.deepcopy(whole), logits_to_keep=STEPS + 1, prompt_length=length)
            ours = logits.logits[:, :-1].log_softmax(-1).gather(-1, new)
            assert low <= (ours - steps).abs().max() <= high


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize("config", ["function", "capped"])
def test_the_cache_it_fills_goes_on_as_the_runs_own(name, config):
    model = shared_model(name, dtype=torch.float64)
    inputs = inputs_of(model, (0, 1, 2), text=40)
    with dare(model, CONFIGS[config]), torch.no_grad():
        out = generate(model, inputs, max_new_tokens=STEPS)
        whole = written(inputs, out.sequences[:, :-1])
        cache = DareCache()
        whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
        told = lengths(inputs)
        model(**copy.deepcopy(whole), prompt_length=told, **{CACHE: cache}, use_cache=True)
        assert cache.hops.tolist() == cache_of(out).hops.tolist()
        mask = torch.cat([whole["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        steps = [
            model(
                input_ids=out.sequences[:, -1:],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                **{CACHE: each},
                use_cache=True,
            ).logits
            for each in (cache, cache_of(out))
        ]
        assert cache.kept_lengths().equal(cache_of(out).kept_lengths())
    torch.testing.assert_close(*steps, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES[:2])
def test_routers_learn_from_it(name):
    base = tiny_model(name, dtype=torch.float64)
    model = adapted(base)
    inputs = inputs_of(base, (1, 2))
    out = generate(model, inputs, max_new_tokens=STEPS)
    whole, told = written(inputs, out.sequences), lengths(inputs)
    with torch.no_grad():
        compact = model(**copy.deepcopy(whole), prompt_length=told).logits
    assert_parity(compact, out, (0, 0), name)
    simulated = model(**copy.deepcopy(whole), prompt_length=told).logits
    assert_parity(simulated.detach(), out, (0, 0), name)
    labels = whole["input_ids"].clone()
    labels[:, :-STEPS] = -100
    supervised = model(**copy.deepcopy(whole), labels=labels).logits
    assert simulated.equal(supervised)
    (simulated.square().mean() + auxiliary_loss(model)[0]).backward()
    grads = [p.grad for n, p in model.named_parameters() if "dare_router" in n]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)


BAD = {
    "nothing": 0,
    "too many": 1000,
    "negative": -3,
    "one row is short": torch.tensor([20, 1]),
    "rows": torch.tensor([5, 5, 5]),
    "a rate": 0.5,
    "floats": torch.tensor([5.0, 5.0]),
    "flags": torch.tensor([True, True]),
    "a matrix": torch.tensor([[5, 5]]),
    "a word": "5",
    "a flag": True,
}


@pytest.mark.parametrize("name", NAMES[:2])
def test_what_is_no_prompt_length(name):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1))
    labels = inputs["input_ids"]
    with dare(model, CONFIGS["function"]), torch.no_grad():
        plain = generate(model, inputs).sequences
        for what, told in BAD.items():
            if what == "one row is short":
                told = torch.stack([lengths(inputs)[0] + 1, lengths(inputs)[1]])
            with pytest.raises(DareInputError, match="prompt_length"):
                model(**copy.deepcopy(inputs), prompt_length=told)
        for other in ({"labels": labels}, {"hop_ids": torch.zeros_like(labels)}):
            with pytest.raises(DareInputError, match="prompt_length"):
                model(**copy.deepcopy(inputs), prompt_length=5, **other)
        cache = DareCache()
        model(**copy.deepcopy(inputs), **{CACHE: cache})
        with pytest.raises(DareInputError, match="prompt_length"):
            model(input_ids=labels, prompt_length=5, **{CACHE: cache})
        assert generate(model, inputs).sequences.equal(plain)
        with dare_disabled(model):
            model(**copy.deepcopy(inputs), prompt_length=5)


class Judge(LogitsProcessor):
    """Takes log-probabilities of what was written so far, told where its prompt ends."""

    def __init__(self, model, inputs):
        self.model, self.inputs, self.logits = model, inputs, []

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > self.inputs["input_ids"].shape[1]:
            whole = written(self.inputs, input_ids)
            told = lengths(self.inputs)
            self.logits.append(self.model(**whole, prompt_length=told, use_cache=False).logits)
        return scores


@pytest.mark.parametrize("name", NAMES[:2])
def test_inside_a_generate(name):
    model = shared_model(name, dtype=torch.float64)
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, CONFIGS["function"]):
        judge = Judge(model, inputs)
        out = generate(model, inputs, logits_processor=LogitsProcessorList([judge]))
    for step, logits in enumerate(judge.logits):
        expected = torch.stack(out.logits[: step + 2], dim=1)
        ours = logits[:, -step - 2 :]
        barred = expected <= torch.finfo(torch.float32).min
        assert (ours - expected).masked_fill(barred, 0).abs().max() <= TOLERANCE
