"""The console script: quick help, commands that register the method, a name for what is missing."""

import json
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import dare_hf

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# As pip writes it, and then what was loaded.
SCRIPT = """
import json, sys, atexit
loaded = lambda: [n for n in ("torch", "peft", "dare_hf.peft_method") if n in sys.modules]
atexit.register(lambda: sys.stderr.write("loaded " + json.dumps(loaded())))
{before}
from dare_hf.command import main
sys.exit(main())
"""


def _script(folder: Path, *arguments: str, before: str = "") -> tuple[int, str, list[str]]:
    """Exit code, stderr, and which of the heavy modules a start of `dare-hf` loaded."""
    file = folder / "dare-hf"
    file.write_text(SCRIPT.format(before=before), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True)
    told, _, loaded = done.stderr.rpartition("loaded ")
    return done.returncode, told, json.loads(loaded)


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["--version"]])
def test_help_loads_no_torch_and_is_quick(arguments: list[str], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, told, loaded = _script(tmp_path, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (code, loaded) == (0, []), told
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 1.5, "CPU-seconds"


def test_a_command_registers_the_method_first(tmp_path: Path) -> None:
    code, told, loaded = _script(tmp_path, "info", str(tmp_path / "nowhere"))
    assert code == 2
    assert len(told.strip().splitlines()) == 1
    assert loaded == ["torch", "peft", "dare_hf.peft_method"]


def test_a_public_name_registers_it_too(tmp_path: Path) -> None:
    code, _, loaded = _script(tmp_path, "--help", before="from dare_hf import DareConfig")
    assert code == 0
    assert "dare_hf.peft_method" in loaded


def test_any_other_program_registers_at_import() -> None:
    program = "import sys, dare_hf; print('dare_hf.peft_method' in sys.modules)"
    run = [sys.executable, "-c", program, "dare-hf"]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "True\n"


def test_without_typer_it_says_how_to_install_it(tmp_path: Path) -> None:
    code, told, _ = _script(tmp_path, "--help", before="sys.modules['typer'] = None")
    assert code == 2
    assert told == (
        "dare-hf: expected typer, which the command line needs; got an installation without "
        "it. Install it with the command line: pip install 'dare-hf[cli]'\n"
    )


@pytest.mark.parametrize("command", ["demo", "plot"])
def test_without_matplotlib_nothing_runs_before_it_is_named(command: str, tmp_path: Path) -> None:
    code, told, _ = _script(tmp_path, command, before="sys.modules['matplotlib'] = None")
    assert code == 2
    assert len(told.strip().splitlines()) == 1
    assert "pip install 'dare-hf[cli]'" in told


def test_routing_needs_none_of_them(tmp_path: Path) -> None:
    program = """
import sys
for name in ("typer", "rich", "matplotlib"):
    sys.modules[name] = None
from dare_hf import *
from dare_hf import apply_dare, last_report
from dare_hf.evaluation import measure
from dare_hf.generation import HopLoop
from dare_hf.testing import tiny_inputs, tiny_model
from dare_hf.training import DareTrainer
from dare_hf.tuning import tune
model = apply_dare(tiny_model("llava"))
model.generate(**tiny_inputs(model), max_new_tokens=2)
assert "<svg" in last_report(model).to_html()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_project_says_what_it_needs_and_ships_what_the_docs_name() -> None:
    core = {line.split(">")[0] for line in PROJECT["dependencies"]}
    cli = {line.split(">")[0] for line in PROJECT["optional-dependencies"]["cli"]}
    assert cli == {"matplotlib", "rich", "typer"}
    assert not core & cli
    assert "PyYAML" in core
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    shipped = tool["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"CITATION.cff", "CONTRIBUTING.md", "README.md", "CHANGELOG.md"} <= set(shipped)
    assert all((ROOT / name).exists() for name in shipped)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["version"], cited["license"]) == (dare_hf.__version__, PROJECT["license"])
