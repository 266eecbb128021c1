"""What people are used to from other tools: near names, --version, interrupts, print(model)."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from row_models import llama_folder, written_rows
from transformers.generation.streamers import BaseStreamer
from typer.testing import CliRunner

import dare_hf
from dare_hf import DareConfig, apply_dare, register_scorer, remove_dare
from dare_hf.calibration import fit_router
from dare_hf.cli import app
from dare_hf.cli.console import progress
from dare_hf.config.scorer_names import REGISTERED
from dare_hf.errors import DareConfigError
from dare_hf.testing import tiny_inputs, tiny_model


@pytest.fixture
def mine() -> str:
    """A name that is registered in the test and forgotten after it."""
    yield "test_mine"
    REGISTERED.pop("test_mine", None)


def test_a_scorer_nobody_registered_is_refused_when_the_config_is_made(mine: str) -> None:
    known = r"'attention'.*'router'.*register_scorer before, got 'snapkv'\.$"
    with pytest.raises(DareConfigError, match=known):
        DareConfig(scorer="snapkv")
    with pytest.raises(DareConfigError, match=r"got 'atention' \(near to it: attention"):
        DareConfig.preset("safe", scorer="atention")
    with pytest.raises(DareConfigError, match="got 7"):
        DareConfig(scorer=7)
    register_scorer(mine, lambda hidden, modality, **_: hidden[..., 0].sigmoid())
    assert DareConfig(scorer=mine).scorer == mine
    with pytest.raises(DareConfigError, match=r"'test_mine'.*near to it: test_mine"):
        DareConfig(scorer="test_min")


def test_a_name_in_a_file_may_be_registered_after_it_is_read(mine: str, tmp_path: Path) -> None:
    register_scorer(mine, lambda hidden, modality, **_: hidden[..., 0].sigmoid())
    DareConfig(scorer=mine).save_pretrained(tmp_path)
    del REGISTERED[mine]  # as in another process
    config = DareConfig.from_pretrained(tmp_path)
    assert config.scorer == mine
    twin = copy.deepcopy(config)
    model = tiny_model("llava")
    with pytest.raises(DareConfigError, match=f"got '{mine}'"):
        apply_dare(model, config)
    with pytest.raises(DareConfigError, match=f"got '{mine}'"):
        apply_dare(model, str(tmp_path))
    register_scorer(mine, lambda hidden, modality, **_: hidden[..., 0].sigmoid())
    apply_dare(model, twin)
    remove_dare(model)


def test_near_misses_of_presets_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DareConfigError, match=r"got 'pyramidrop' \(near to it: pyramiddrop\)"):
        DareConfig.preset("pyramidrop")
    with pytest.raises(DareConfigError, match=r"'./saef' \(near to it: safe\)"):
        apply_dare(tiny_model("llava"), "./saef")


def test_print_tells_that_dare_is_on_and_forgets_it_exactly() -> None:
    model = tiny_model("llava")
    before, own = repr(model), set(vars(model))
    apply_dare(model, DareConfig(schedule="constant", vision_retention=0.25))
    told = repr(model).splitlines()[1]
    assert told.strip() == (
        "DARE is on: schedule='constant', vision_retention=0.25, text_retention=0.7, "
        "scorer='attention'"
    )
    assert repr(copy.deepcopy(model)) == repr(model)
    remove_dare(model)
    assert repr(model) == before
    assert set(vars(model)) == own


def test_print_of_learned_or_listed_rates_names_no_rate() -> None:
    model = tiny_model("llava")
    apply_dare(model, DareConfig(schedule=[(0.5, 1.0)] * 4))
    assert "DARE is on: schedule='by layer', scorer='attention'" in repr(model)


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"dare-hf {dare_hf.__version__}\n")


def test_each_command_has_an_example() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert {"report", "plot", "train", "bench"} <= set(names)
    for name in names:
        text = CliRunner().invoke(app, [name, "--help"]).stdout
        assert re.search(rf"Example: dare-hf {name}\b", text), name


def test_bench_json_is_one_line_alone_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    from dare_hf.benchmark import runner

    def bench(series, setting, *, lengths, **options):
        return {"bench": series, "tokens": lengths}

    monkeypatch.setattr(runner, "bench", bench)
    monkeypatch.setattr(runner, "text", lambda result: "the table")
    done = CliRunner().invoke(app, ["bench", "--json", "--tokens", "40"])
    assert json.loads(done.stdout) == {"bench": "prefill", "tokens": [40]}
    assert "the table" in done.stderr
    assert "{" not in CliRunner().invoke(app, ["bench"]).stdout


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_eval_says_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dare_hf.tuning import row_eval

    model = llama_folder(tmp_path / "model")
    rows = written_rows(tmp_path, 2, images=False, answer="w")
    monkeypatch.setattr(row_eval, "answer", _interrupt)
    run = ["eval", "--model", str(model), "--data", str(rows)]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 130
    assert "interrupted; nothing was saved. With --out" in done.stderr
    out = tmp_path / "out.jsonl"
    done = CliRunner().invoke(app, [*run, "--out", str(out)])
    assert f"so far is in {out}" in done.stderr


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_interrupted_training_says_what_it_left(
    checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dare_hf import recipes

    monkeypatch.setattr(recipes, "train", _interrupt)
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: anole\ntask: maze\nout: {tmp_path / 'run'}\n")
    if checkpoint:
        (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    done = CliRunner().invoke(app, ["train", "--config", str(file)])
    assert done.exit_code == 130, done.output
    said = "checkpoint-20: the same command with --resume" if checkpoint else "nothing was saved."
    assert said in done.stderr


def test_fit_router_tells_how_far_it_is() -> None:
    model, told = tiny_model("llava"), []
    batches = [tiny_inputs(model)] * 2
    routed = fit_router(model, batches, max_new_tokens=4, progress=lambda *line: told.append(line))
    routed.unload()
    assert told[:2] == [("observe", 1, 2), ("observe", 2, 2)]
    layers = [done for stage, done, _ in told[2:] if stage == "layers"]
    assert layers == list(range(1, told[-1][2] + 1)), "each layer for each modality"


def test_a_streamer_hears_the_ids_that_generate_returns() -> None:
    class Heard(BaseStreamer):
        ids: list[int]

        def put(self, value: torch.Tensor) -> None:
            self.ids = [*getattr(self, "ids", []), *value.flatten().tolist()]

        def end(self) -> None:
            self.ids.append(-1)

    model, heard = tiny_model("llava"), Heard()
    apply_dare(model)
    ids = model.generate(**tiny_inputs(model), max_new_tokens=5, do_sample=False, streamer=heard)
    assert heard.ids == [*ids[0].tolist(), -1]


def test_prints_under_a_bar_go_where_stdout_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich: stderr is a terminal
    with progress() as tell:
        tell("rows", 1, 2)
        print("a row for the pipe")
    assert capsys.readouterr().out == "a row for the pipe\n"
