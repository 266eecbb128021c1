"""The changes of a mutation run are changes, and are Python."""

import ast
from pathlib import Path

import pytest

SOURCES = ["routing/selection.py", "cache/columns.py", "hops/eviction.py", "engine/masks.py"]


@pytest.fixture
def mutation_points(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "scripts"))
    return pytest.importorskip("mutation_points", reason="the scripts are not in this tree")


@pytest.mark.parametrize("name", SOURCES)
def test_every_change_is_another_program(mutation_points, name):
    source = (Path(__file__).parents[2] / "dare_hf" / name).read_text()
    found = mutation_points.points(source)
    assert len(found) > 50
    texts = [mutation_points.mutate(source, point) for point in found]
    assert ast.unparse(ast.parse(source)) not in texts
    for text in texts:
        compile(text, name, "exec")


def test_what_only_describes_is_left_alone(mutation_points):
    source = '''"""Doc."""
def f(x: int = 1) -> int:
    """Doc."""
    raise ValueError(f"{x + 1}")
'''
    (only,) = mutation_points.points(source)
    assert (only.line, only.what) == (2, "plus one")
