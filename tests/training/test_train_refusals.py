"""What a training forward refuses, by name; afterwards the model trains and generates as before."""

import pytest
import torch
from laws import SCORER, dare, forward, generate, inputs_of, shared_model
from router_runs import FIELDS, controller_of, routed, trainee, written_batch

from dare_hf import DareCache, DareConfig, apply_dare, remove_dare
from dare_hf.compat import CACHE
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.simulation.layout import read_layout
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss


def layout(*, ids=None, labels=None, hop_ids=None, delimiters=(), window=None):
    """The layout of one row without pads."""
    rows = [torch.tensor([row]) if row is not None else None for row in (ids, labels, hop_ids)]
    real = torch.ones_like(next(row for row in rows if row is not None), dtype=torch.bool)

    class Rules:
        pass

    rules = Rules()
    rules.delimiters, rules.window = delimiters, window
    return read_layout(*rows, real, rules)


X = -100


def test_hops_of_labels_are_counted_by_hand():
    found = layout(
        ids=[1, 9, 5, 9, 5, 7, 7, 9, 5, 5, 7, 5],
        labels=[X, X, 5, 9, 5, X, X, 9, 5, 5, X, 5],
        delimiters=((9,),),
    )
    assert found.hop.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 5, 5]]
    assert found.injects


def test_a_delimiter_does_not_reach_across_an_injected_span():
    found = layout(ids=[1, 8, 3, 9, 8, 9, 5], labels=[X, 8, X, 9, 8, 9, 5], delimiters=((8, 9),))
    assert found.hop.tolist() == [[0, 1, 2, 2, 2, 2, 3]]


def test_windows_count_sampled_tokens_only():
    found = layout(labels=[X, 1, 1, 1, X, X, 1, 1, 1], window=2)
    assert found.hop.tolist() == [[0, 1, 1, 2, 3, 3, 3, 3, 4]]


def test_an_injected_span_right_after_a_delimiter_opens_one_hop():
    found = layout(ids=[1, 9, 7, 7, 5], labels=[X, 9, X, X, 5], delimiters=((9,),))
    assert found.hop.tolist() == [[0, 1, 2, 2, 2]]


@pytest.mark.parametrize(
    ("hops", "labels", "text"),
    [
        ([0, 0, 2], None, "rising by 1"),
        ([0, 1, 0], None, "rising by 1"),
        ([2, 2, 2], None, "rising by 1"),
        ([0, 1, 1], [X, 5, X], "only on the tokens that open it"),
    ],
)
def test_hop_ids_that_describe_no_run_are_refused(hops, labels, text):
    with pytest.raises(DareInputError, match=text):
        layout(hop_ids=hops, labels=labels)


def test_given_hop_ids_tell_spans_by_labels():
    found = layout(hop_ids=[0, 0, 1, 2, 2, 2], labels=[X, 5, 5, X, 5, 5])
    assert found.sampled.tolist() == [[False, False, True, False, True, True]]
    assert found.injects


def refused(model, batch, match, error=DareInputError, **kwargs):
    with pytest.raises(error, match=match):
        forward(model, {}, **{**batch, **kwargs})


def test_refusals_of_a_routed_model():
    with routed(trainee("llava")) as model:
        batch, out, _ = written_batch(model)
        before = forward(model, batch).logits
        refused(model, batch, "shape of the tokens", hop_ids=batch["labels"][:, 1:])
        cache = DareCache()
        inputs = inputs_of(model.get_base_model(), (0, 1, 2))
        forward(model, inputs, **{CACHE: cache})
        refused(model, batch, CACHE, **{CACHE: cache})
        refused(model, batch, CACHE, hop_ids=batch["labels"], **{CACHE: cache})
        forward(model, batch, **{CACHE: DareCache()})
        assert torch.equal(forward(model, batch).logits, before)
        again = generate(model, inputs, max_new_tokens=4)
        assert len(again.logits) == 4
    assert out is not None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"hop_score": "observed"}, "hop_score"),
        ({"batch_budget": "equal"}, "batch_budget"),
    ],
)
def test_settings_that_cannot_be_simulated_are_refused(fields, match):
    with routed(trainee("llava"), **fields) as model:
        batch, _, _ = written_batch(model)
        refused(model, batch, match)


def test_float16_is_refused():
    model = tiny_model("llava", dtype=torch.float16)
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)
        refused(wrapped, batch, "float16")
    with routed(trainee("llava")) as wrapped:
        batch, _, _ = written_batch(wrapped)
        with torch.autocast("cpu", torch.float16):
            refused(wrapped, batch, "float16")


def test_reentrant_checkpoints_are_refused():
    model = tiny_model("llava")
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)
        wrapped.train()
        model.activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(DareInputError, match="use_reentrant"):
            wrapped(**batch)
        model.activation_checkpointing_enable({"use_reentrant": False})
        wrapped(**batch).loss.backward()


def test_a_layer_repeated_by_an_outer_checkpoint_is_refused():
    model = tiny_model("llava")
    with routed(model) as wrapped:
        batch, _, _ = written_batch(wrapped)
        layer = model.model.language_model.layers[2]
        inner = layer.forward

        def outer(*args, **kwargs):
            return torch.utils.checkpoint.checkpoint(inner, *args, use_reentrant=False, **kwargs)

        layer.forward = outer
        loss = wrapped(**batch).loss
        with pytest.raises(DareStateError, match="activation_checkpointing_enable"):
            loss.backward()
        layer.forward = inner


def test_the_attention_scorer_cannot_train_on_injected_spans():
    model = shared_model("llava")
    inputs = inputs_of(model)
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = X
    labels[:, -3] = X
    with dare(model, DareConfig(**FIELDS)):
        refused(model, inputs, "scorer", labels=labels)
        refused(model, inputs, "scorer", hop_ids=torch.zeros_like(labels))
        generate(model, inputs)
    with dare(model, scorer=SCORER):
        forward(model, inputs, labels=labels)


def test_delimiters_need_ids():
    with routed(trainee("llava")) as model:
        batch, _, span = written_batch(model)
        batch.pop("mm_encoder_outputs", None)
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = model.get_base_model().get_input_embeddings()(ids)
        batch["modality_mask"] = (ids == 3).long()
        refused(model, batch, "hop_ids")
        hops = (torch.arange(ids.shape[1]) >= span).long().expand_as(ids)
        forward(model, batch, hop_ids=hops)


def test_no_auxiliary_loss_without_a_training_forward():
    with routed(trainee("llava")) as model:
        with pytest.raises(DareStateError, match="labels"):
            auxiliary_loss(model)
        batch, _, _ = written_batch(model)
        with pytest.raises(DareStateError, match="labels"):
            auxiliary_loss(model)  # generate is no training forward
        forward(model, batch)
        total, parts = auxiliary_loss(model)
        inner, _ = auxiliary_loss(model.get_base_model())
    assert set(parts) == {"ratio_text", "soft_vision", "hard_vision"}
    assert total == inner
    torch.testing.assert_close(total, sum(parts.values()))
    apply_dare(model := tiny_model("llava"))
    with pytest.raises(DareStateError, match="router"):
        auxiliary_loss(model)
    remove_dare(model)


def test_a_failed_forward_leaves_no_record():
    with routed(trainee("llava")) as model:
        batch, _, _ = written_batch(model)
        forward(model, batch)
        layer = model.get_base_model().model.language_model.layers[2]
        handle = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        handle.remove()
        assert controller_of(model).record is None
