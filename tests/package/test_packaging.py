"""The package as a user gets it: what is public is documented, and importing it changes nothing."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dare_hf

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dare_hf"
SOURCES = sorted(PACKAGE.rglob("*.py"))

PUBLIC_MODULES = (
    "dare_hf",
    "dare_hf.calibration",
    "dare_hf.convert",
    "dare_hf.errors",
    "dare_hf.evaluation",
    "dare_hf.expected",
    "dare_hf.generation",
    "dare_hf.policies",
    "dare_hf.suites",
    "dare_hf.testing",
    "dare_hf.training",
    "dare_hf.tuning",
    "dare_hf.visualize",
)
PAGES = (
    "reference.md",
    "reference-testing.md",
    "papers-models.md",
)  # where public names are documented


def _public_names() -> list[str]:
    names = []
    for module in PUBLIC_MODULES:
        found = importlib.import_module(module)
        exported = getattr(found, "__all__", None) or vars(found)
        own = [n for n in exported if not hasattr(found, "__all__") and _is_error(found, n)]
        names += [f"{module}.{n}" for n in own or exported if not n.startswith("__")]
    return names


def _is_error(module, name: str) -> bool:
    value = getattr(module, name)
    return isinstance(value, type) and issubclass(value, Exception)


@pytest.mark.parametrize("name", _public_names())
def test_public_name_is_documented(name: str) -> None:
    reference = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)
    short = name.rpartition(".")[2]
    assert re.search(rf"^::: dare_hf[\w.]*\.{short}$", reference, re.MULTILINE), (
        f"{name} is public: add '::: {name}' to docs/reference.md"
    )


def test_config_page_has_every_field() -> None:
    config = pytest.importorskip("dare_hf.config", reason="dare_hf.config does not exist yet")
    from peft import PeftConfig

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    own = set(config.DareConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    missing = sorted(name for name in own if f"| `{name}` |" not in page)
    assert not missing, f"add a row for {missing} to docs/configuration.md"


def test_import_is_inert() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "inert_import.py")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_on_arguments_of_public_functions(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            given = {
                argument.arg
                for argument in ast.walk(function.args)
                if isinstance(argument, ast.arg)
            }
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assert):
                    used = {
                        node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)
                    }
                    assert not used & (given - {"self"}), (
                        f"{path.name}:{statement.lineno}: raise a DareError for what a caller gives"
                    )


def test_version_is_that_of_the_distribution() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{dare_hf.__version__}"' in project
