"""Recipes: what a file may say, and that both recipes run, save and load again."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dare_hf import DareConfig, apply_dare
from dare_hf.demo.embedded import load_embedded
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.recipes import Recipe, load_recipe, train
from dare_hf.recipes.data import JsonLines, ResponseCollator, TaskStream, datasets_of
from dare_hf.tasks import maze, mvot

GOOD = "model: anole\nout: x\ntask: maze\n"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["router.yaml", "router_lora.yaml"])
def test_examples_are_recipes(name):
    recipe = load_recipe(EXAMPLES / name)
    config = recipe.dare_config((5,))
    assert (config.scorer, config.schedule) == ("router", "learned")
    assert config.hop_delimiters == (5,)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", "names and values"),
        ("model: anole\nout: x\n", "task, data"),
        ("model: anole\nout: x\ntask: chess\n", "chess"),
        ("model: anole\nout: x\ntask: maze\ndata: y\n", "task, data"),
        ("model: anole\nout: x\ntask: maze\nstep: 3\n", "got step"),
        ("model: anole\ntask: maze\n", "expected out"),
        ("model: anole\nout: x\ntask: maze\nsteps: 0\n", "steps"),
        ("model: anole\nout: x\ntask: maze\ndare: {kappa: 2}\n", "kappa"),
        ("model: anole\nout: x\ntask: maze\ndare: {vision_retention: 2}\n", "vision_retention"),
        ("model: anole\nout: x\ntask: maze\ndare: null\n", "at least one"),
        ("a: [", "YAML"),
        (f"{GOOD}router_lr: .nan\n", r"router_lr .* nan. \(line 4 of"),
        (f"{GOOD}learning_rate: -3e-4\n", r"learning_rate .* -0.0003. \(line 4 of"),
        (f"{GOOD}rate_lr: [1, 2]\n", r"rate_lr .*\(line 4 of"),
        (f"{GOOD}steps: 1:30\n", r"steps .* '1:30'. \(line 4 of"),
        (f"{GOOD}bf16: yes\n", r"bf16 .* 'yes'. \(line 4 of"),
        (f"{GOOD}seed: 1e3\n", r"seed .*\(line 4 of"),
        (f"{GOOD}dare:\n  hop_decay: -1\n", r"hop_decay .*\(line 5 of"),
        (f"{GOOD}lora: {{r: -1}}\n", r"r must be an integer >= 1"),
        (f"{GOOD}lora: {{rank: 4}}\n", r"lora: .*rank.*\(line 4 of"),
        (f"{GOOD}steps: 3\nsteps: 4\n", "once.*\\n.*line 5"),
        (f"{GOOD}lora: &a {{r: 4}}\ndare: *a\n", "aliases.*\\n.*line 5"),
        (f"{GOOD}x: !!python/object/apply:os.abort []\n", "line 4"),
        (f"{GOOD}steps: {'9' * 5000}\n", "steps"),
        ("[" * 5000, "too deep"),
        ("model: a\n\udcff", "line 2"),
    ],
)
def test_what_no_run_could_use_is_refused(tmp_path, text, match):
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DareConfigError, match=match):
        load_recipe(file)


def test_a_number_is_a_number(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"{GOOD}learning_rate: 3e-4\nrouter_lr: 1E-3\nrate_lr: 1\nseed: 010\n")
    recipe = load_recipe(file)
    assert (recipe.learning_rate, recipe.router_lr, recipe.rate_lr) == (3e-4, 1e-3, 1.0)
    assert recipe.seed == 10


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DareConfigError, match="YAML"):
        load_recipe(tmp_path / "none.yaml")


def test_the_stream_takes_its_tasks_in_turn():
    stream = TaskStream(("maze", "ghost"), 5, seed=3, first=7)
    kinds = [type(stream[k]["item"]).__name__ for k in range(len(stream))]
    assert kinds == ["MazeItem", "GhostItem", "MazeItem", "GhostItem", "MazeItem"]
    assert stream[2]["item"] == maze.sample_one("train", 3, 8)


def test_json_lines_say_what_is_wrong(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(DareInputError, match="line 1"):
        JsonLines(file)
    file.write_text('{"images": "a.png", "prompt": "a", "response": "b"}\n')
    with pytest.raises(DareInputError, match="list of paths"):
        JsonLines(file)
    file.write_text("\n")
    with pytest.raises(DareInputError, match="at least one line"):
        JsonLines(file)
    good = b'{"images": [], "prompt": "a", "response": "b"}\n'
    (tmp_path / "text.png").write_text("no picture")
    pictures = [good.replace(b"[]", f'["{name}"]'.encode()) for name in ("none.png", "text.png")]
    for bad in (b"\xff\xfe", b"[" * 100_000, b"null", good.replace(b"[]", b"[3]"), *pictures):
        file.write_bytes(good + bad)
        with pytest.raises(DareInputError, match="line 2"):
            JsonLines(file)


def test_rows_are_checked_before_weights_are_loaded(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    loads = []
    monkeypatch.setattr("dare_hf.recipes.run._load", loads.append)
    recipe = Recipe("anole", str(tmp_path / "out"), data=str(tmp_path / "rows.jsonl"))
    with pytest.raises(DareInputError, match="line 1"):
        train(recipe)
    assert not loads


def test_rows_of_a_file_learn_the_response_only(tmp_path):
    _, processor = load_embedded("anole")
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    rows = [
        {"images": ["a.png"], "prompt": "Go up. <image>", "response": "Go left."},
        {"images": [], "prompt": "Go", "response": " down. Go up."},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = JsonLines(file)
    for row, wanted in ((data[0], "Go left."), (data[1], "down. Go up.")):
        made = ResponseCollator(processor, (processor.image_token_id,))([row])
        learned = made["labels"][0][made["labels"][0] != -100]
        assert processor.decode(learned, skip_special_tokens=True).strip() == wanted
        assert learned[-1] == processor.tokenizer.eos_token_id
        assert (made["pixel_values"].shape[0] if row["images"] else 0) == len(row["images"])


@pytest.mark.slow
def test_routers_alone_train_save_and_load(tmp_path):
    recipe = Recipe("anole", str(tmp_path), task=("maze",), steps=2, batch_size=2)
    plain, processor = load_embedded("anole")
    result = train(recipe)
    trained = result.model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained[name]), name
    assert set(result.folders) == {"dare"}
    entries = [json.loads(x) for x in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert entries[0]["recipe"]["task"] == ["maze"]
    assert any("dare/soft_vision" in entry for entry in entries)
    items = maze.sample(2, "easy", seed=0)
    again = apply_dare(plain, result.folders["dare"])
    assert _ids(again, processor, items) == _ids(result.model, processor, items)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_routers_and_lora_train_save_and_load(tmp_path):
    lora = {"r": 4, "init_lora_weights": False}  # as if it had been trained
    recipe = Recipe("anole", str(tmp_path), task=("maze",), steps=2, batch_size=2, lora=lora)
    result = train(recipe)
    assert set(result.folders) == {"dare", "lora"}
    items = maze.sample(2, "easy", seed=0)
    plain, processor = load_embedded("anole")
    before = _ids(copy.deepcopy(plain), processor, items)
    plain.load_adapter(result.folders["lora"], "lora")
    plain.load_adapter(result.folders["dare"], "dare")
    plain.set_adapter(["lora", "dare"])
    after = _ids(plain, processor, items)
    assert after == _ids(result.model, processor, items)
    assert after != before


@pytest.mark.slow
def test_the_control_trains_a_lora_on_the_unpruned_model(tmp_path):
    recipe = Recipe(
        "anole", str(tmp_path), task=("maze",), steps=1, batch_size=2, dare=None, lora={"r": 4}
    )
    result = train(recipe)
    assert set(result.folders) == {"lora"}
    assert "_dare" not in vars(result.model)
    assert recipe.dare_config(()) == DareConfig(
        scorer="random", vision_retention=1.0, text_retention=1.0, schedule="constant"
    )


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    def adapters(folder, resume=False, **fields):
        recipe = Recipe(
            "volcano", str(folder), task=("scene",), steps=2, batch_size=2, lora={"r": 4}, **fields
        )
        told = []
        done = train(recipe, resume=resume, progress=lambda *line: told.append(line))
        assert told == [("steps", step, 2) for step in ((2,) if resume else (1, 2))]
        state = done.model.state_dict()
        return {key: state[key] for key in state if "lora_" in key or "dare_" in key}

    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with pytest.raises(DareStateError, match="expected a checkpoint"):
        adapters(stopped, resume=True)
    wanted = adapters(whole, save_every=1)
    shutil.copytree(whole / "checkpoint-1", stopped / "checkpoint-1")
    found = adapters(stopped, resume=True)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, msg=key)
    lines = (stopped / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines] == [None, 2, 2]


@pytest.mark.slow
def test_what_is_best_on_rows_held_out_is_saved(tmp_path):
    rates = {"warmup": 2, "router_lr": 0.5, "lora": {"r": 4}, "learning_rate": 0.5}
    run = {"steps": 3, "batch_size": 2, "save_every": 1, "validate": 4}
    recipe = Recipe("volcano", str(tmp_path), task=("scene",), **run, **rates)
    result = train(recipe)
    losses = {entry["step"]: entry["eval_loss"] for entry in result.log if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert sorted(losses) == [1, 2, 3]
    assert best < 3
    for name, folder in result.folders.items():
        files = (tmp_path / f"checkpoint-{best}" / name, tmp_path / "checkpoint-3" / name, folder)
        kept, last, saved = (load_file(Path(f) / "adapter_model.safetensors") for f in files)
        assert all(torch.equal(tensor, kept[key]) for key, tensor in saved.items())
        assert any(not torch.equal(tensor, last[key]) for key, tensor in saved.items())


def test_rows_held_out_are_not_trained_on(tmp_path):
    fields = {"steps": 2, "batch_size": 3, "save_every": 1, "validate": 4}
    recipe = Recipe("anole", "out", task=("maze", "ghost"), **fields)
    learned, held = datasets_of(recipe, processes=2)
    assert (len(learned), len(held)) == (12, 4)
    seen = [learned[k]["item"] for k in range(12)]
    assert all(held[k]["item"] not in seen for k in range(4))
    assert datasets_of(replace(recipe, validate=0))[1] is None
    file = tmp_path / "rows.jsonl"
    lines = [{"images": [], "prompt": "Go", "response": str(k)} for k in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    learned, held = datasets_of(replace(recipe, task=(), data=str(file)))
    responses = [[rows[k]["response"] for k in range(len(rows))] for rows in (learned, held)]
    assert responses == [["0", "1"], ["2", "3", "4", "5"]]
    with pytest.raises(DareInputError, match="validate: expected fewer rows than the 6"):
        datasets_of(replace(recipe, task=(), data=str(file), validate=6))
    with pytest.raises(DareConfigError, match="save_every: expected a divisor"):
        replace(recipe, save_every=0)


def _ids(model, processor, items):
    return [solution.ids for solution in mvot.solve(model.eval(), processor, items)]


@pytest.mark.parametrize("calibrate", [0, 2])
def test_equal_rates_are_where_a_run_starts(tmp_path, calibrate):
    """Two-stage rates, and those of a fit, differ by layer."""
    recipe = Recipe(
        "volcano",
        str(tmp_path),
        task=("scene",),
        dare={"vision_retention": 0.4, "text_retention": 1.0},
        steps=1,
        batch_size=2,
        rate_lr=0.0,
        calibrate=calibrate,
        equal_rates=True,
        rate_margin=0.1,
    )
    for router in train(recipe).model._dare.controller.routers:
        expected = torch.tensor([0.9, 0.4]).expand_as(router.rates())  # inside the margin
        torch.testing.assert_close(router.rates(), expected)


@pytest.mark.slow
def test_calibration_comes_before_the_first_step(tmp_path):
    """Rates of a calibrated start differ by layer, and stay where a gradient moves them."""
    recipe = Recipe(
        "anole",
        str(tmp_path),
        task=("maze",),
        steps=1,
        batch_size=2,
        warmup=0,
        calibrate=2,
        rate_margin=0.1,
    )
    start = recipe.dare_config(()).vision_retention
    result = train(recipe)
    routers = result.model._dare.controller.routers
    vision = torch.stack([router.rates()[0, 1] for router in routers])
    assert vision.min() > 0.09
    assert vision.max() < 0.91
    assert (vision - start).abs().max() > 0.3


def test_numbers_are_checked():
    for name in ("calibrate", "save_every", "validate"):
        with pytest.raises(DareConfigError, match=f"{name} must be an integer >= 0, got -1"):
            Recipe("anole", "out", task=("maze",), **{name: -1})
    with pytest.raises(DareConfigError, match=r"rate_margin must be a share in \(0, 0.5\), got 1"):
        Recipe("anole", "out", task=("maze",), rate_margin=1)
