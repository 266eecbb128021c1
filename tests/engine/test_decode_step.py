"""What a decode step costs beside the model's own: calls and operations are counted, not time."""

from collections import Counter

import pytest
import torch
from hop_runs import DELIMITER, LONG, SPECIAL_IDS, closing, new_tokens
from laws import FP32_TOLERANCE, assert_close, dare, generate, inputs_of, shared_model

from dare_hf import DareCache, DareConfig, apply_dare, last_report, register_scorer, remove_dare
from dare_hf.benchmark.operations import Operations
from dare_hf.cache import DareLayer
from dare_hf.compat import CACHE
from dare_hf.engine import step as quick

RATES = {"vision_retention": 0.5, "text_retention": 0.6, "schedule": "constant"}


@pytest.fixture
def calls():
    """Tokens a row had in each call of the registered scorer "counted", by layer."""
    seen = Counter(), []

    def score(hidden, modality, *, layer, hop, positions):
        seen[0][layer] += 1
        seen[1].append((layer, positions[0].tolist()))
        return torch.sigmoid(hidden.float().mean(-1))

    register_scorer("counted", score)
    return seen


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_scorer_is_called_once_for_a_closed_hop(name, calls):
    counts, tokens = calls
    model = shared_model(name)
    inputs = inputs_of(model, (1,))
    size = inputs["input_ids"].shape[1]
    with dare(model, scorer="counted", hop_delimiters=(DELIMITER,), **RATES):
        closing(model, inputs, [[3, 9]], return_dict_in_generate=False, output_logits=False)
    assert set(counts.values()) == {3}, "the prompt, and two closed hops"
    first = [where for layer, where in tokens if layer == 0]
    assert first == [
        list(range(a, b)) for a, b in ((0, size), (size, size + 4), (size + 4, size + 10))
    ]


@pytest.mark.parametrize("rates", [0.5, 1.0])
def test_no_token_is_scored_where_no_hop_can_close(rates, calls):
    counts, _ = calls
    model = shared_model("llava")
    inputs = inputs_of(model, (1,))
    fields = {"vision_retention": rates, "text_retention": rates, "schedule": "constant"}
    with dare(model, scorer="counted", **fields):
        generate(model, inputs, return_dict_in_generate=False, output_logits=False)
    assert set(counts.values()) == ({1} if rates < 1 else set())


def step_operations(model, inputs, steps=8) -> list[int]:
    """Operations of each decode step of a generate."""
    found, inner = [], model.model.forward

    def counted(*args, **kwargs):
        with Operations() as operations:
            output = inner(*args, **kwargs)
        found.append(operations.count)
        return output

    model.model.forward = counted
    try:
        suppressed = (*SPECIAL_IDS, DELIMITER)
        generate(model, inputs, max_new_tokens=steps, suppress_tokens=suppressed)
    finally:
        del model.model.forward
    return found[2:]


@pytest.mark.parametrize("fields", [{}, {"scorer": "random"}], ids=["observed", "stored"])
@pytest.mark.parametrize("rows", [(1,), (1, 0)], ids=["alone", "ragged"])
def test_a_layer_adds_no_operation_to_a_step(fields, rows):
    """Two writes into the slabs stand for the two joins of transformers' cache."""
    plain = shared_model("llava")
    inputs = inputs_of(plain, rows)
    bare = step_operations(plain, inputs)
    model = apply_dare(
        shared_model("llava"), DareConfig(**RATES, **fields, hop_delimiters=(DELIMITER,))
    )
    try:
        ours = step_operations(model, inputs)
    finally:
        remove_dare(model)
    assert [a - b for a, b in zip(ours, bare, strict=True)] == [0] * len(bare)


@pytest.mark.parametrize("name", ["llava", "gemma3", "chameleon"])
def test_joined_steps_count_what_single_ones_do(name, monkeypatch):
    model = shared_model(name)
    inputs = inputs_of(model, (1, 0))

    def report():
        with dare(model, scorer="key_norm", hop_delimiters=(DELIMITER,), **RATES):
            out = closing(model, inputs, [[3, 9], [5]])
            return last_report(model).to_dict() | {"seconds": 0}, new_tokens(inputs, out)

    ours, tokens = report()
    monkeypatch.setattr("dare_hf.engine.controller.is_step", lambda *args, **kwargs: False)
    single, same = report()
    assert tokens.shape[1] == LONG
    assert tokens.tolist() == same.tolist()
    assert ours == single


def test_a_step_falls_back_where_a_layer_needs_its_mask(monkeypatch):
    """Sliding layers of ragged rows take the long way, the others do not."""
    taken = Counter()
    inner = quick.prepare

    def counted(state, *args):
        done = inner(state, *args)
        taken[state.sees_all, done] += 1
        return done

    monkeypatch.setattr(quick, "prepare", counted)
    model = shared_model("gemma3")
    with dare(model, scorer="key_norm", **RATES):
        out = generate(model, inputs_of(model, (1, 0)))
    assert CACHE in out
    assert taken[True, True] > 0
    assert taken[False, False] > 0
    assert taken[True, False] == 0


@pytest.mark.parametrize("way", ["generate", "bare"])
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_mask_that_hides_earlier_words_hides_them_from_steps_too(name, way, monkeypatch):
    """A later turn may hide words of the one before: such a mask says more than where pads are."""
    model = shared_model(name)
    inputs = inputs_of(model, (0, 0))
    size = inputs["input_ids"].shape[1]
    fields = {"scorer": "attention", "text_retention": 0.6, "schedule": "constant"}

    def later(hide: bool) -> list[torch.Tensor]:
        cache = DareCache()
        with dare(model, **fields):
            first = generate(model, inputs, **{CACHE: cache}, max_new_tokens=3)
            ids = torch.cat([first.sequences, torch.tensor([[20, 21], [22, 23]])], dim=1)
            mask = torch.ones_like(ids)
            mask[:, :size] = inputs["attention_mask"]
            if hide:
                mask[:, size - 3 : size + 1] = 0
            given = {"input_ids": ids, "attention_mask": mask}
            if way == "generate":
                return list(generate(model, given, **{CACHE: cache}, max_new_tokens=5).logits)
            found = []
            with torch.no_grad():
                for step in range(4):
                    wide = torch.cat([mask[:, : size + 2], mask.new_ones(2, step + 1)], dim=1)
                    new = {"input_ids": torch.tensor([[30 + step], [40]]), "attention_mask": wide}
                    found.append(model(**new, **{CACHE: cache}, use_cache=True).logits[:, -1])
            return found

    ours, seeing = later(hide=True), later(hide=False)
    assert max((a - b).abs().max() for a, b in zip(ours, seeing, strict=True)) > 1e-2
    monkeypatch.setattr("dare_hf.engine.controller.is_step", lambda *args, **kwargs: False)
    for left, right in zip(ours, later(hide=True), strict=True):
        assert_close(left, right, tolerance=FP32_TOLERANCE, what=name)


def test_the_mask_of_steps_follows_the_rows():
    """Repeated where every column is a token: no table tells one mask from the other."""
    layer = DareLayer()
    keys = torch.zeros(2, 1, 3, 4)
    layer.stage(None, 3, [3, 3])
    layer.update(keys, keys)
    assert layer.visible().shape == (2, 1, 1, 4)
    layer.batch_repeat_interleave(2)
    assert layer.visible().shape == (4, 1, 1, 4)
