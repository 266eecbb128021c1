"""The demo's own parts: when a hop begins, where images are, and what the plain side costs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dare_hf import DareCache, DareConfig
from dare_hf.assets import board
from dare_hf.compat import CACHE, cache_of
from dare_hf.demo import embedded
from dare_hf.errors import DareConfigError, DareStateError
from dare_hf.evaluation import Arm, trained_arm
from dare_hf.testing import tiny_inputs, tiny_model
from dare_hf.visualize import HopWatch, plot_rates

EMBEDDED = [name for name, kind in embedded.RUNNERS.items() if kind.folder != board.NAME]
"""Those that the package holds whole; tests/models/test_board_demo.py has the other."""


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_hops_are_noted_in_their_first_forward(name: str) -> None:
    from hop_runs import DELIMITER, closing

    model = tiny_model(name)
    inputs = tiny_inputs(model)
    config = DareConfig(vision_retention=0.5, text_retention=0.8, hop_delimiters=(DELIMITER,))
    cache = DareCache()
    watch = HopWatch(cache)
    armed = Arm("x", config).on(model)
    closing(armed, inputs, [{2, 6}], streamer=watch, **{CACHE: cache}, max_new_tokens=12)
    length = inputs["input_ids"].shape[1]
    begun = [seen for _, seen, _ in watch.states]
    # After the prompt, and when the token after each delimiter has been processed.
    assert begun == [length, length + 4, length + 8]
    held = [sum(map(len, stored)) for _, _, stored in watch.states]
    assert held[0] < length * len(cache.stored)


def test_image_columns_are_whole_images() -> None:
    from dare_hf.demo.anole import columns_after

    assert columns_after([0, 5, 1, 1, 6, 5, 1], begin_id=5, length=2) == [range(2, 4)]
    assert columns_after([5, 1, 1, 5, 1, 1], begin_id=5, length=2) == [range(1, 3), range(4, 6)]


def test_scenes_and_crops_are_runs_of_placeholders() -> None:
    from dare_hf.demo.volcano import Volcano

    model = SimpleNamespace(config=SimpleNamespace(image_seq_length=4))
    runner = Volcano(model, SimpleNamespace(image_token_id=5))
    assert runner.grid == (2, 2)
    assert runner.image_columns([1, 5, 5, 5, 5, 2, 5, 5, 5, 5]) == [range(1, 5), range(6, 10)]
    outputs = torch.tensor([[1, 1, 2, 5, 5, 5, 5, 3], [1, 1, 2, 0, 0, 0, 0, 3]])
    batch = SimpleNamespace(outputs=outputs, prompt_length=2)
    assert runner.sampled_columns(batch) == 2


def test_the_plain_sides_cost_is_what_transformers_runs() -> None:
    from dare_hf.demo.cost import PlainCost
    from dare_hf.tasks.mvot import BatchOutput

    model = tiny_model("chameleon", attn_implementation="eager")
    inputs = tiny_inputs(model, batch=2)
    with FlopCounterMode(display=False) as counter:
        output = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    cost = PlainCost(model, lambda batch: 5)
    cost(BatchOutput((0, 1), inputs, output, inputs["input_ids"].shape[1]))
    assert cost.flops == counter.get_total_flops()
    assert cost.sampled == 10
    layers = cache_of(output).layers
    stored = sum(t.numel() * t.itemsize for layer in layers for t in (layer.keys, layer.values))
    assert cost.kv_bytes == stored


def test_unknown_and_missing_models_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    with pytest.raises(DareConfigError, match=r"expected anole, volcano, board, got 'x'$"):
        embedded.load_embedded("x")
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    for name in EMBEDDED:
        with pytest.raises(DareStateError, match="reinstall"):
            embedded.load_embedded(name)


def test_the_full_side_is_the_model_without_the_adapters(trained_volcano) -> None:
    from dare_hf.demo.comparison import compare

    runner = embedded.load_runner("volcano")
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    ends = (runner.delimiter(runner.processor),)
    items = runner.sample(1, "easy", seed=3)
    result = compare(runner, items, trained_arm("pair", trained_volcano, ends=ends))
    assert result.full.score == runner.score(runner.solve(items))
    assert result.full.score.accuracy == 1.0
    # The LoRA of the pair is random: nothing it writes is right.
    assert result.dare.detail < result.full.detail
    assert 0 < result.to_dict()["kv_ratio"] < 1
    whole = [layer["vision"] == 1 for layer in result.retention[0]]
    assert whole == [True] * 2 + [False] * (len(whole) - 2)
    after = runner.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not {"_dare", "peft_config"} & set(vars(runner.model))


def test_the_picture_of_rates_has_a_cell_for_each_hop_and_layer() -> None:
    layer = {"vision": 0.25, "text": None}
    figure = plot_rates([[layer] * 3] * 2, "held")
    vision, text = figure.axes[:2]
    assert vision.images[0].get_array().shape == text.images[0].get_array().shape == (3, 2)
    assert [cell.get_text() for cell in vision.texts] == ["25%"] * 6
    assert not text.texts, "where there is no token, nothing is stated"


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_both_sides_count_the_same_when_nothing_is_pruned(name: str) -> None:
    from dare_hf.demo.comparison import compare

    runner = embedded.load_runner(name)
    everything = DareConfig(
        vision_retention=1.0,
        text_retention=1.0,
        schedule="constant",
        hop_delimiters=(runner.delimiter(runner.processor),),
    )
    told = []
    result = compare(
        runner,
        runner.sample(3, "easy", seed=3),
        Arm("everything", everything),
        batch_size=2,
        progress=lambda side, done, total: told.append((side, done, total)),
    )
    assert result.full.score == result.dare.score
    assert result.full.detail == result.dare.detail
    assert result.full.sampled == result.dare.sampled
    assert result.full.flops == result.dare.flops
    assert result.full.kv_bytes == result.dare.kv_bytes
    assert {x for hop in result.retention for y in hop for x in y.values()} <= {1.0, None}
    assert list(dict.fromkeys(side for side, _, _ in told)) == ["full", "DARE"]
    for name_of_side in ("full", "DARE"):  # which rows share a call is the task's business
        done = [count for side, count, total in told if side == name_of_side and total == 3]
        assert (done[0], done[-1]) == (0, 3)
        assert done == sorted(set(done))


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_picture_has_a_column_for_each_hop(name: str) -> None:
    from dare_hf.demo.picture import draw, solve_one

    runner = embedded.load_runner(name)
    config = embedded.demo_config(runner.processor, name)
    items = runner.sample(8, "easy", seed=1)
    solved = solve_one(runner, items, Arm("training-free", config))
    figure = draw(solved.images, solved.title)
    top, bottom = figure.subfigs
    assert len(bottom.axes) == 3
    assert [axes.get_title().split()[0] for axes in bottom.axes] == ["early", "middle", "late"]
    assert len(top.axes) > 1
    for axes in bottom.axes:
        assert len(axes.get_xticks()) == len(top.axes), "a hop begins after each image"
        # A triangle: image i is there from hop i + 1 on.
        assert len(axes.images) == len(top.axes) * (len(top.axes) + 1) // 2
