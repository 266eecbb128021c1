"""`dare-hf demo` and `eval` of dare-board: on a tiny stand-in, and on the real one where it is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import board_stand_in
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from dare_hf import DareConfig, cli
from dare_hf.assets import backbone, board
from dare_hf.demo import arms, embedded, picture
from dare_hf.demo.comparison import compare
from dare_hf.errors import DareInputError
from dare_hf.evaluation import Arm, measure
from dare_hf.evaluation.phases import watched
from dare_hf.evaluation.suite import TASKS
from dare_hf.tasks import board as task
from dare_hf.tasks import board_render, board_run

JSON_KEYS = ["n", "accuracy_full", "accuracy_dare", "flops_ratio", "kv_ratio"]
JSON_KEYS += ["seconds_full", "seconds_dare"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line finds the stand-in where dare-board would be."""
    if not board_stand_in.SCRIPTS.is_dir():
        pytest.skip("the training scripts are not in this tree")
    root = tmp_path_factory.mktemp("stand_in")
    text_model = root / "text"
    text_model.mkdir()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(board_stand_in.SCRIPTS)
        board_stand_in.write_backbone(text_model)
        patch.setattr(board, "FOLDER", board_stand_in.ship(text_model, root / "shipped"))
        patch.setattr(backbone, "read", lambda: board_stand_in.read_backbone(text_model))
        patch.setattr(constants, "HF_HOME", str(root / "home"))
        yield embedded.load_runner("board")
    torch.set_num_threads(threads)


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


def test_the_demo_keeps_its_contract(stand_in: Any, tmp_path: Path) -> None:
    done = _run("demo", "--model", "board", "--n", "6", "--json", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == JSON_KEYS
    assert result["n"] == 6
    assert result["kv_ratio"] < 0.8
    assert result["flops_ratio"] < 0.8
    for words in ("dare-board: 6 held-out questions", "  colour", "  above", "of prefill"):
        assert words in done.stderr
    assert "training-free, pruning without training" in done.stderr
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_eval_has_kinds_phases_and_controls(stand_in: Any) -> None:
    options = ("eval", "--model", "board", "--n", "12", "--training-free", "--json")
    found = {}
    for control in ("", "blank", "shuffled"):
        done = _run(*options, *(["--control", control] if control else []))
        assert done.exit_code == 0, done.stderr
        found[control] = json.loads(done.stdout)
        assert found[control]["control"] == (control or None)
    result = found[""]
    assert list(result["kinds"]) == list(task.KINDS)
    assert 0 < result["phase_seconds"]["prefill"] < result["seconds"]
    assert 0 < result["phase_seconds"]["decode"] < result["seconds"]
    assert result["kv_ratio"] < 0.8
    done = _run(*options, "--control", "upside-down")
    assert done.exit_code == cli.REFUSED
    assert "blank, shuffled" in done.stderr


def test_only_board_has_controls() -> None:
    with pytest.raises(DareInputError, match=r"maze \(there is none\)"):
        TASKS["maze"].control("blank", [])


def test_controls_show_something_else(stand_in: Any) -> None:
    items = task.sample(3)
    own = [board_render.item_to_image(item).tobytes() for item in items]
    blank, shuffled = (
        [picture.tobytes() for picture in TASKS["board"].control(name, items)]
        for name in ("blank", "shuffled")
    )
    assert shuffled == [own[1], own[2], own[0]]
    assert len(set(blank)) == 1
    assert not set(blank) & set(own)
    seen = []

    def solve(model: Any, processor: Any, items: Any, *rest: Any, pictures: Any = None, **k: Any):
        seen.append(pictures)
        return board_run.solve(model, processor, items, *rest, pictures=pictures, **k)

    watching = SimpleNamespace(solve=solve, score=board_run.score, detail=None)
    shown = TASKS["board"].control("blank", items)
    runner = stand_in
    measure(runner.model, runner.processor, watching, Arm("x"), items, pictures=shown)
    assert seen[-1] is shown


def test_both_sides_agree_where_nothing_is_pruned(stand_in: Any) -> None:
    everything = DareConfig(vision_retention=1.0, text_retention=1.0, schedule="constant")
    items = stand_in.sample(6, "easy", 0)
    result = compare(stand_in, items, Arm("everything", everything))
    assert result.full.score == result.dare.score
    assert result.full.flops == result.dare.flops
    assert result.full.kv_bytes == result.dare.kv_bytes


def test_the_picture_shows_the_board_once(stand_in: Any) -> None:
    arm = arms.demo_arm("board", stand_in.processor, (), adapter=None, training_free=False)
    assert arm.name == "training-free"
    assert arm.config.hop_delimiters == ()
    solved = picture.solve_one(stand_in, task.sample(6), arm)
    figure = picture.draw(solved.images, solved.title)
    top, bottom = figure.subfigs
    assert len(top.axes) == 1
    assert [len(axes.images) for axes in bottom.axes] == [1, 1, 1]


def test_seconds_are_split_by_columns_and_memory_is_what_is_held() -> None:
    class Model(torch.nn.Module):
        device, held = torch.device("cpu"), None

        def forward(self, input_ids: torch.Tensor) -> None:
            if input_ids.shape[1] > 1:
                self.held = torch.ones(50_000_000)  # 200 MB, let go of before the end

    model = Model()
    with watched(model) as watch:
        model(input_ids=torch.ones(1, 5))
        first = dict(watch.seconds)
        model.held = None
        model(torch.ones(1, 1))
    assert first["prefill"] > 0
    assert first["decode"] == 0
    assert watch.seconds["decode"] > 0
    assert watch.seconds["prefill"] == first["prefill"]
    assert watch.peak_bytes is None or 150e6 < watch.peak_bytes < 300e6
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
