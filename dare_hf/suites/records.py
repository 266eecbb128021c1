"""Rows of a published data file (JSON lines, JSON or parquet), each of which knows its place."""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import re
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.tuning.rows import Inline, Row, check_picture, inside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_SPACE = re.compile(r"\s*")
_LONGEST_NAME = 255  # of a file
_MOST_PIXELS = 1e9  # neither infinite nor too long for a float
_SHORTEST_PICTURE = 64  # letters in base64; no PNG or JPEG is as small


@dataclass(frozen=True)
class Record:
    """One row as it was published.

    Attributes:
        values: Its fields.
        line: Its line in the file, from 1; its row where the file has no lines.
        place: The file and the line, as errors say it.
        root: The folder its pictures lie in.
    """

    values: dict[str, Any]
    line: int
    place: str
    root: Path

    def refused(self, reason: str) -> DareInputError:
        """The error of a row that cannot be used; `reason` says expected and got."""
        return self._bare.refused(reason)

    def text(self, key: str) -> str:
        """A field that is text and not blank.

        Raises:
            DareInputError: It is not.
        """
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.refused(f"{key}: expected text; got {value!r:.80}")
        return value

    def label(self, key: str) -> str:
        """A field that names a group: text, or a whole number.

        Raises:
            DareInputError: It is neither.
        """
        value = self.values.get(key)
        number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if number else self.text(key)

    def whole(self, key: str, below: int) -> int:
        """A field that is a whole number in [0, below).

        Raises:
            DareInputError: It is not.
        """
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise self.refused(
                f"{key}: expected a whole number from 0 to {below - 1}; got {value!r:.80}"
            )
        return value

    def options(self, key: str) -> tuple[str, ...]:
        """A field that is a list of 2 to 26 different texts.

        Raises:
            DareInputError: It is not.
        """
        value = self.values.get(key)
        good = isinstance(value, list) and all(isinstance(v, str) and v.strip() for v in value)
        if not good or not 2 <= len(set(value)) == len(value) <= 26:
            raise self.refused(
                f"{key}: expected a list of 2 to 26 different texts; got {value!r:.80}"
            )
        return tuple(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A field that is a list of `count` numbers of a size that pixels have.

        Raises:
            DareInputError: It is not.
        """
        value = self.values.get(key)
        good = isinstance(value, list) and len(value) == count
        if not good or not all(_pixels(v) for v in value):
            raise self.refused(f"{key}: expected {count} numbers; got {value!r:.80}")
        return tuple(float(v) for v in value)

    def picture(
        self, key: str, folders: Sequence[str] = ("",), endings: Sequence[str] = ("",)
    ) -> Path | Inline:
        """A field that is a picture: a file below the root, the bytes, or those in base64.

        Args:
            key: The field.
            folders: Where a file of that name is looked for, below the root.
            endings: What is put behind the name.

        Raises:
            DareInputError: There is no such file, it lies outside the root, or is no picture.
        """
        value = self.values.get(key)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        data = value
        if isinstance(value, str) and value:
            names = [f"{f}/{value}{e}" if f else f"{value}{e}" for f in folders for e in endings]
            short = len(value) <= _LONGEST_NAME
            there = [name for name in names if short and (self.root / name).is_file()]
            data = None if there or len(value) < _SHORTEST_PICTURE else _of_base64(value)
            if there or (data is None and short):
                return inside(there[0] if there else names[0], self.root.resolve(), self._bare)
        if not isinstance(data, bytes) or not data:
            raise self.refused(
                f"{key}: expected a picture's file, or the picture itself; got {value!r:.80}"
            )
        picture = Inline(data)
        check_picture(picture, self.place)
        return picture

    @property
    def _bare(self) -> Row:
        return Row(self.line, (), place=self.place)


def _pixels(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -_MOST_PIXELS < value < _MOST_PIXELS


def _of_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def read_records(data: Path, patterns: Sequence[str]) -> list[Record]:
    """All rows of a benchmark's data.

    Args:
        data: The folder it was downloaded to, or the file itself.
        patterns: Names of the file below the folder, in order of preference.

    Raises:
        DareInputError: There is no such file, more than one, or one that cannot be read.
        DareConfigError: It is parquet and `datasets` is not installed.
    """
    files, root = _files(data, patterns), data if data.is_dir() else data.parent
    if files[0].suffix == ".parquet":
        found = [
            Record(values, row, f"{files[0].name}: row {row}", root)
            for row, values in enumerate(_of_parquet(files), 1)
        ]
    else:
        found = []
        for line, values in _of_json(files[0]):
            record = Record(values, line, f"{files[0].name}: line {line}", root)
            if not isinstance(values, dict):
                raise record.refused(f"expected a JSON object; got {values!r:.80}")
            found.append(record)
    if not found:
        raise DareInputError(f"data: expected at least one row; got none in {files[0]}")
    return found


def _files(data: Path, patterns: Sequence[str]) -> list[Path]:
    if data.is_file():
        return [data]
    for pattern in patterns:
        found = sorted(file for file in data.glob(pattern) if file.is_file())
        if len(found) > 1 and found[0].suffix != ".parquet":
            names = ", ".join(file.name for file in found)
            raise DareInputError(f"data: expected one file; got {names} in {data}. Name one")
        if found:
            return found
    raise DareInputError(f"data: expected {' or '.join(patterns)} in {data}; got none")


def _of_json(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of each JSON line, or of each member of a JSON list, with the line it is on."""
    try:
        text = file.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise DareInputError(f"data: expected JSON in UTF-8; got {file}: {error!s:.200}") from error
    if text.lstrip().startswith("["):
        yield from _members(text, file)
        return
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            yield line, _decoded(part.strip(), 0, file, line, whole=True)[0]


def _members(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    line, place, wanted = 1, 0, "["
    while True:
        start = place
        place = _SPACE.match(text, place).end()
        line += text.count("\n", start, place)
        if text[place : place + 1] == "]" and wanted == ",":
            return
        if text[place : place + 1] != wanted:
            raise DareInputError(
                f"data: {file.name}: line {line}: expected {wanted} or ] of a JSON list; got "
                f"{text[place : place + 40]!r}"
            )
        start = place + 1
        place = _SPACE.match(text, start).end()
        line += text.count("\n", start, place)
        if wanted == "[" and text[place : place + 1] == "]":
            return
        value, end = _decoded(text, place, file, line)
        yield line, value
        line += text.count("\n", place, end)
        place, wanted = end, ","


def _decoded(text: str, place: int, file: Path, line: int, whole: bool = False) -> tuple[Any, int]:
    """The JSON value at a place, which ends the text if it is whole; and where it ends."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, place)
        if whole and end < len(text):
            raise ValueError(f"more behind it: {text[end : end + 40]!r}")
    except (ValueError, RecursionError) as error:
        raise DareInputError(
            f"data: {file.name}: line {line}: expected a JSON object; got "
            f"{text[place : place + 80]!r} ({error!s:.80})"
        ) from error
    return value, end


def _of_parquet(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of parquet files as the hub has them; pictures stay encoded."""
    if find_spec("datasets") is None:
        raise DareConfigError(
            f"data: expected the package datasets, to read {files[0].name}; it is not installed. "
            "pip install 'dare-hf[benchmarks]'"
        )
    datasets = importlib.import_module("datasets")
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = datasets.Dataset.from_parquet(
                [str(file) for file in files], cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # pyarrow and datasets have many kinds
            raise DareInputError(
                f"data: expected parquet; got {files[0]}: {error!s:.200}"
            ) from error
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        yield from table
