"""The dry run of scripts/gpu_check.py, which has to be right when a GPU is at hand."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return pytest.importorskip("gpu_check", reason="the scripts are not in this tree")


def test_a_dry_run_fills_every_section(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run", "--out", str(tmp_path / "dry")])
    with pytest.raises(SystemExit) as left:
        gpu_check.main()
    result = json.loads((tmp_path / "dry.json").read_text())
    sections = result["sections"]
    assert {name: told["error"] for name, told in sections.items() if "error" in told} == {}
    assert left.value.code == 0
    assert list(sections) == list(gpu_check.SECTIONS)
    assert all(told["rows"] for told in sections.values())
    assert all(row["held"].startswith("oracle") for row in sections["laws"]["rows"])
    assert len(sections["laws"]["rows"]) == 6
    decoded = sections["decode"]["rows"]
    assert {row["batch"] for row in decoded} == set(gpu_check.DRY.batches)
    assert all(row["checked"].startswith("oracle") for row in decoded)
    steps = {row["system"]: row["decode_waits"] for row in sections["operations"]["rows"]}
    assert steps["dare_0.4_0.7"] == 0
    page = (tmp_path / "dry.md").read_text()
    assert all(f"## {name} (" in page for name in sections)
    assert page.strip() in capsys.readouterr().out


def only(gpu_check, monkeypatch, **sections):
    """A check of sections of the test's own."""
    check = gpu_check.Check(gpu_check.DRY)
    monkeypatch.setattr(gpu_check, "SECTIONS", dict.fromkeys(sections, 5))
    for name, section in sections.items():
        monkeypatch.setattr(check, name, section, raising=False)
    return check


def test_a_section_that_fails_is_told_and_the_next_goes_on(gpu_check, monkeypatch):
    def broken():
        raise ZeroDivisionError("by zero")

    check = only(gpu_check, monkeypatch, one=broken, two=lambda: [{"a": 1}])
    saved = []
    result = gpu_check.run(check, lambda found: saved.append(list(found["sections"])))
    assert saved == [["one"], ["one", "two"]]
    assert result["sections"]["one"]["error"] == "ZeroDivisionError: by zero"
    assert result["sections"]["two"]["rows"] == [{"a": 1}]
    assert "failed: ZeroDivisionError" in gpu_check.page(result)


def test_a_section_ends_when_its_time_is_over(gpu_check, monkeypatch):
    check = only(gpu_check, monkeypatch, one=lambda: time.sleep(60), two=lambda: [{"a": 1}])
    check.shapes = replace(check.shapes, patience=0.01)
    result = gpu_check.run(check, lambda found: None)
    assert "TimeoutError" in result["sections"]["one"]["error"]
    assert result["sections"]["two"]["rows"] == [{"a": 1}]


def test_sections_are_left_out_when_the_five_minutes_are_over(gpu_check, monkeypatch):
    check = only(gpu_check, monkeypatch, one=lambda: [{"a": 1}])
    monkeypatch.setattr(gpu_check, "LIMIT", -1.0)
    told = gpu_check.run(check, lambda found: None)["sections"]["one"]
    assert "five minutes" in told["error"]


def test_without_a_gpu_it_says_so(gpu_check, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="dry-run"):
        gpu_check.main()
