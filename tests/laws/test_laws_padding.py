"""Law 3: a row's output depends neither on other rows nor on its padding."""

import pytest
from laws import (
    ATTENTIONS,
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    dare,
    forward,
    generate,
    rows_of,
    shared_model,
)

from dare_hf.compat import cache_of
from dare_hf.testing import collate

SCORERS = ("attention", "random", "key_norm", "position", SCORER)
PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}
IMAGES = (0, 1, 2)


def batches(model, rows):
    """Yield batches of the same rows: each with the places of the rows in it."""
    yield "padded", collate(model, rows), [0, 1, 2]
    yield "padded more", collate(model, rows, pad_to=45), [0, 1, 2]
    yield "in another order", collate(model, [rows[2], rows[0], rows[1]]), [2, 0, 1]
    yield "with one more", collate(model, [*rows, rows[0]]), [0, 1, 2, 0]


def hold_rows(model, fields):
    rows = rows_of(model, IMAGES)
    with dare(model, **fields):
        alone = [generate(model, collate(model, [row])) for row in rows]
        for what, batch, places in batches(model, rows):
            out = generate(model, batch)
            kept = cache_of(out).kept_lengths()
            for row, place in enumerate(places):
                new = alone[place].sequences[0, -len(out.logits) :].tolist()
                assert out.sequences[row, -len(out.logits) :].tolist() == new, f"{what}: row {row}"
                for step, (ours, theirs) in enumerate(
                    zip(out.logits, alone[place].logits, strict=True)
                ):
                    assert_close(
                        ours[row],
                        theirs[0],
                        tolerance=FP32_TOLERANCE,
                        what=f"{what}: row {row}, step {step}",
                    )
                expected = cache_of(alone[place]).kept_lengths()[:, 0]
                assert kept[:, row].tolist() == expected.tolist(), f"{what}: row {row}"


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_row_alone_is_the_row_in_a_batch(name, attention, pruned):
    hold_rows(shared_model(name, attention), {"pruned": pruned, **PRUNED})


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_scorer_sees_other_rows(name, scorer):
    schedule = {"schedule": "two_stage"} if scorer == "attention" else {}
    hold_rows(shared_model(name), {"scorer": scorer, **PRUNED, **schedule})


@pytest.mark.parametrize("name", TINY_MODELS)
def test_an_even_grid_and_shared_plans_see_one_row_only(name):
    fields = {"scorer": "attention", "uniform_share": 0.5, "plan_every": 2}
    hold_rows(shared_model(name), {**fields, **PRUNED})


@pytest.mark.parametrize("name", TINY_MODELS)
def test_right_padding_is_no_padding(name):
    model = shared_model(name)
    rows = rows_of(model, IMAGES)
    batch = collate(model, rows, left_pad=False)
    with dare(model, **PRUNED):
        logits = forward(model, batch).logits
        for index, row in enumerate(rows):
            alone = forward(model, collate(model, [row])).logits[0]
            assert_close(
                logits[index, : len(alone)], alone, tolerance=FP32_TOLERANCE, what=f"row {index}"
            )


def test_the_equal_budget_is_the_row_budget_at_batch_one():
    model = shared_model("llava")
    for images in IMAGES:
        inputs = collate(model, rows_of(model, (images,)))
        runs = []
        for budget in ("row", "equal"):
            with dare(model, batch_budget=budget, **PRUNED):
                runs.append(generate(model, inputs))
        assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
        kept = [cache_of(run).kept_lengths().tolist() for run in runs]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_under_the_equal_budget_rows_of_one_length_keep_the_same_number(name):
    model = shared_model(name)
    rows = rows_of(model, (1, 1), text=(12, 12)) if name != "qwen2_5_vl" else None
    rows = rows or rows_of(model, (0, 0), text=(12, 12))
    with dare(model, batch_budget="equal", **PRUNED):
        out = generate(model, collate(model, rows))
    kept = cache_of(out).kept_lengths()
    assert (kept == kept[:, :1]).all()
