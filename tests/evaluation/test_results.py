"""`dare-hf tables`: the committed page is made of the committed files, and lines are checked."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dare_hf.cli import app
from dare_hf.errors import DareInputError
from dare_hf.evaluation.paired import mcnemar
from dare_hf.evaluation.results import COLUMNS, read_results, results_page

DOCS = Path(__file__).parents[2] / "docs"


def _line(**more):
    return {
        "model": "m",
        "task": "t",
        "split": "easy",
        "arm": "dare_l",
        "change": None,
        "budget": "paper",
        "seed": 0,
        "items_seed": 7,
        "n": 4,
        "accuracy": 0.5,
        "right": "1100",
        "kv_ratio": 0.4,
        "flops_ratio": {"all": 0.5, "prefill": 0.6, "decode": 0.7},
    } | more


def _file(folder, *lines, name="a.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("model", ["anole", "volcano"])
def test_the_page_is_that_of_the_files(model):
    """Mend it with: dare-hf tables docs/results --model anole --out docs/results-anole.md."""
    done = CliRunner().invoke(app, ["tables", str(DOCS / "results"), "--model", model])
    assert done.exit_code == 0, done.output
    assert done.stdout == (DOCS / f"results-{model}.md").read_text(encoding="utf-8")


def test_every_model_has_a_page_and_others_are_refused():
    models = {one["model"] for f in (DOCS / "results").glob("*.jsonl") for one in read_results(f)}
    assert all((DOCS / f"results-{name}.md").exists() for name in models)
    with pytest.raises(DareInputError, match="expected one of anole, volcano; got 'board'"):
        results_page(DOCS / "results", "board")


def test_a_table_by_hand(tmp_path):
    full = _line(
        arm="full", n=6, right="111101", accuracy=5 / 6, kv_ratio=None, flops_ratio=None, seed=1
    )
    other = full | {"seed": 2, "right": "000000", "accuracy": 0.0}
    _file(tmp_path, full, other, _line(accuracy=0.0, right="0000"))
    _file(tmp_path, _line(), _line(items_seed=8, change="shuffled"), name="b.jsonl")
    page = results_page(tmp_path)
    rows = [line for line in page.splitlines() if line.startswith(("| paper", "|  | full"))]
    assert rows[0] == "|  | full | 1 | 6 | 83.3 (43.6 to 97.0) | 100.0 | 100.0 | 100.0 |  |"
    assert rows[2].startswith("| paper | dare_l | 0 | 4 | 0.0 (0.0 to 49.0) | 40.0 | 50.0 | 60.0 |")
    assert rows[2].endswith(f"-100.0 (-100.0 to -100.0), p {mcnemar(4, 0):.2g} |")
    assert f"-50.0 (-100.0 to +0.0), p {mcnemar(2, 0):.2g} |" in rows[3]
    assert "dare_l (shuffled)" in rows[4]
    assert rows[4].endswith("| 60.0 |  |"), "other items: not compared"
    assert "### m, t, easy (items seed 8)" in page


def test_of_several_lines_of_a_run_the_last_counts(tmp_path):
    file = _file(tmp_path, _line(), _line(right="1111", accuracy=1.0), _line(seed=1))
    assert [(one["seed"], one["accuracy"]) for one in read_results(file)] == [(0, 1.0), (1, 0.5)]


@pytest.mark.parametrize("name", COLUMNS)
def test_a_line_without_a_key_is_refused(name, tmp_path):
    bad = _line()
    del bad[name]
    file = _file(tmp_path, _line(seed=5), bad)
    with pytest.raises(DareInputError, match=rf"a\.jsonl: line 2: {name}: expected"):
        read_results(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"accuracy": 0.75}, "expected that of its items, 2 of 4"),
        ({"n": 5}, "2 of 4 right"),
        ({"right": "11x0"}, "right: expected a 1 or 0"),
        ({"n": 0, "right": ""}, "n: expected items"),
        ({"flops_ratio": {"all": 1}}, "flops_ratio: expected"),
        ({"seed": True}, "seed: expected"),
        ({"kv_ratio": "0.5"}, "kv_ratio: expected"),
    ],
)
def test_a_line_that_cannot_be_so_is_refused(change, match, tmp_path):
    _file(tmp_path, _line(**change))
    with pytest.raises(DareInputError, match=match) as refused:
        results_page(tmp_path)
    assert "a.jsonl: line 1" in str(refused.value)


def test_the_command_refuses_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n[")
    for folder, word in ((tmp_path, "line 1: model"), (tmp_path / "none", "got none")):
        done = CliRunner().invoke(app, ["tables", str(folder)])
        assert done.exit_code == 2
        assert word in done.stderr
