"""A converted VolCano thinks in boxes under DARE, sees VoCoT's regions, answers in a last turn."""

import itertools

import pytest
import torch
import volcano_source as source
from transformers import LogitsProcessor
from volcano_source import converted, inputs_of, picture, prompt

from dare_hf import DareConfig, dare_applied, last_report
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.generation import BoxRefocus, HopLoop, box_refocus
from dare_hf.generation.boxes import vocot_cells
from dare_hf.generation.vocot_turns import think_then_answer

BOX = "<coor>0.250,0.000,1.000,0.500</coor>"
TOLERANCE = 2e-4
QUESTION = "[INST] is the cat left ? [/INST]"
KEPT = {"schedule": "constant", "vision_retention": 1.0, "text_retention": 1.0}


class Write(LogitsProcessor):
    """Writes given ids from column `start` on, then what the model wants."""

    def __init__(self, ids, start):
        self.ids, self.start, self.step, self.seen = ids, start, 0, []

    def __call__(self, input_ids, scores):
        self.seen.append(scores[0].clone())
        if input_ids.shape[1] < self.start or self.step >= len(self.ids):
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[self.step]] = 0
        self.step += 1
        return forced


def config(processor, **settings):
    end = processor.tokenizer.convert_tokens_to_ids("</coor>")
    return DareConfig(hop_delimiters=(end,), **settings)


def thought_ids(processor, *texts):
    """The ids of texts whose boxes are written character by character."""
    tokenizer, ids = processor.tokenizer, []
    for text in texts:
        before, _, rest = text.partition("<coor>")
        ids += tokenizer.encode(before, add_special_tokens=False)
        if rest:
            box, end = rest[: -len("</coor>")], "</coor>"
            ids += tokenizer.convert_tokens_to_ids(["<coor>", *box, end])
    return ids


def hand_made(side=4):
    """A grid [side, side, 2] whose cells hold their own row and column."""
    cells = torch.arange(side, dtype=torch.float32)
    return torch.stack(torch.meshgrid(cells, cells, indexing="ij"), -1)


def test_a_region_on_a_hand_made_grid_is_theirs_by_hand():
    # x from the second to the last quarter, y in the upper half: rows 1 to 3, columns 0 and 1
    region = hand_made()[vocot_cells((0.25, 0.0, 1.0, 0.5), 4)]
    assert region[..., 0].tolist() == [[1, 1], [2, 2], [3, 3]]
    assert region[..., 1].tolist() == [[0, 1]] * 3


def test_every_box_of_three_decimals_gives_their_region():
    grid = hand_made(24)
    shares = [0.0, 0.001, 0.041, 0.042, 0.125, 0.333, 0.5, 0.708, 0.958, 0.999, 1.0, 1.2]
    for box in itertools.product(shares, repeat=4):
        ours = grid[vocot_cells(box, 24)].reshape(-1, 2)
        theirs = source.region(grid.reshape(-1, 2), box)
        assert ours.tolist() == [cell.tolist() for cell in theirs], box


@pytest.mark.parametrize(
    ("region", "source_"), [("transposed", "features"), ("vocot", "pixels"), (None, "features")]
)
def test_another_kind_of_region_is_refused(region, source_):
    images = [[picture()]] if source_ == "pixels" else None
    with pytest.raises(DareConfigError, match="region"):
        BoxRefocus(source_, images=images, region=region)


def test_empty_boxes_inject_nothing():
    *_, model, processor = converted()
    inputs = inputs_of(processor)
    boxes = ["0.500,0.500,0.250,0.900", "0.250,0.250,0.250,0.900", "1.200,0.100,1.500,0.500"]
    ids = thought_ids(processor, *(f"the <coor>{box}</coor>" for box in boxes))
    refocus = BoxRefocus(region="vocot")
    with dare_applied(model, config(processor, **KEPT)):
        out = model.generate(
            **inputs,
            logits_processor=[Write(ids, 0)],
            hop_loop=HopLoop(refocus, processor=processor),
            max_new_tokens=len(ids) + 2,
            do_sample=False,
        )
    assert (refocus.counts.empty, refocus.counts.used) == (3, 0)
    assert out.shape[1] == inputs["input_ids"].shape[1] + len(ids) + 2


@pytest.mark.parametrize("final", ["kept", "anew"])
def test_both_turns_are_volcanos_by_its_own_maths(final):
    state, model, processor = converted()
    inputs = inputs_of(processor)
    start = inputs["input_ids"].shape[1]
    ids = thought_ids(processor, f"the dog {BOX}", f"left of {BOX.replace('0.000', '0.250')}")
    write = Write(ids, start)
    with dare_applied(model, config(processor, **KEPT)):
        said = think_then_answer(
            model,
            processor,
            inputs,
            final=final,
            question=QUESTION,
            thought_tokens=len(ids) + 3,
            answer_tokens=4,
            logits_processor=[write],
        )
    reference = source.Reference(state)
    features = reference.features(inputs["pixel_values"][0])
    vectors = [*features, *source.region(features, (0.25, 0, 1, 0.5))]
    vectors += source.region(features, (0.25, 0.25, 1, 0.5))
    hole, vectors = processor.image_token_id, iter(vectors)
    pieces = [next(vectors) if i == hole else i for i in said.ids.tolist()]
    assert next(vectors, None) is None, "as many placeholders as vectors"
    assert said.thought.count("</coor>") == 2
    answer = said.answer_ids.tolist()
    for token, scores in zip(answer, write.seen[-len(answer) :], strict=True):
        logits = reference.logits(pieces)[-1]
        torch.testing.assert_close(scores[: len(logits)], logits, atol=TOLERANCE, rtol=TOLERANCE)
        pieces.append(token)


@pytest.mark.parametrize("final", ["kept", "anew"])
def test_a_pruned_volcano_thinks_in_hops_and_answers(final):
    *_, model, processor = converted()
    inputs = inputs_of(processor)
    ids = thought_ids(processor, f"the dog {BOX}", f"left of {BOX}")
    pruned = config(processor, vision_retention=0.4, schedule="constant")
    refocus = BoxRefocus(region="vocot")
    with dare_applied(model, pruned):
        said = think_then_answer(
            model,
            processor,
            inputs,
            final=final,
            refocus=refocus,
            question=QUESTION,
            thought_tokens=len(ids) + 3,
            answer_tokens=3,
            logits_processor=[Write(ids, inputs["input_ids"].shape[1])],
        )
        report = last_report(model)
    assert refocus.counts.used == 2
    assert said.answer_ids.numel() > 0
    assert report.kv_bytes < report.kv_bytes_baseline
    assert report.hops == (5 if final == "kept" else 2)


def test_several_rows_and_another_final_turn_are_refused():
    *_, model, processor = converted()
    text = prompt(processor)
    images = [picture(), picture()]
    two = processor(text=[text] * 2, images=images, return_tensors="pt", add_special_tokens=False)
    with pytest.raises(DareInputError, match="one row; got 2"):
        think_then_answer(model, processor, two)
    with pytest.raises(DareConfigError, match="final"):
        think_then_answer(model, processor, two, final="again")


def test_a_region_of_no_square_grid_is_refused():
    with pytest.raises(DareInputError, match="2 x 3"):
        box_refocus._region(torch.zeros(2, 3, 4), (0, 0, 1, 1), "vocot")
