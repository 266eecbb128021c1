"""Reading YAML as version 1.2 means it, with the line of each name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dare_hf.errors import DareConfigError

_MOST_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Plain data with YAML 1.2's scalars: 3e-4 is a number; yes, 1:30 and 2001-01-01 are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; an alias, which YAML uses to say much in few bytes, is refused."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


_INTEGER = re.compile(r"[-+]?[0-9]{1,400}|0x[0-9a-fA-F]{1,400}|0o[0-7]{1,400}")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_WORDS = {
    "null": re.compile(r"null|Null|NULL|~|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
}
for _tag, _form in {**_WORDS, "int": _INTEGER, "float": _FLOAT}.items():
    _whole = re.compile(rf"(?:{_form.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, None)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The names and values of a file.

    Args:
        path: The file, UTF-8.

    Returns:
        The mapping, and the line (from 1) of each name in it and in the mappings inside.

    Raises:
        DareConfigError: It cannot be read, is no YAML, or holds no mapping, a name twice or an
            alias; the text names the line where there is one.
    """
    lines: dict[str, int] = {}
    try:
        text = _text(Path(path))
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _note_lines(node, lines)
            given = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise _refused(path, "lists or mappings nested too deep") from error
    except (OSError, yaml.YAMLError, ValueError, OverflowError, TypeError, KeyError) as error:
        raise _refused(path, str(error)) from error
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        kind = type(given).__name__
        raise DareConfigError(f"config: expected names and values in {path}; got a {kind}")
    return given, lines


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES >> 20} MiB")
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"bytes that are no UTF-8 text in line {line}") from error


def _note_lines(node: Any, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen if isinstance(key, yaml.ScalarNode) else True:
            problem = "expected each name once, as plain text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        seen.add(key.value)
        lines.setdefault(key.value, key.start_mark.line + 1)
        _note_lines(value, lines)


def _refused(path: str | Path, reason: str) -> DareConfigError:
    return DareConfigError(f"config: expected a YAML file; got {path}: {reason[:400]}")
