"""A user's rows: a file of JSON lines, checked line by line before any weight is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

_FORM = (
    'expected {"messages": [...]} in chat form, or {"prompt", "image" or "images", "answer"?, '
    '"choices"?}'
)
_FIELDS = {"id", "messages", "prompt", "image", "images", "answer", "choices"}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Inline:
    """A picture that lies in the data file itself, read as a file is.

    Attributes:
        data: The encoded picture (PNG, JPEG, ...).
    """

    data: bytes

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        return self.data


@dataclass(frozen=True)
class Row:
    """One question, as a user would ask it.

    Attributes:
        line: Its line in the file, from 1; 0 of one that is in no file.
        messages: What is asked, in chat form: `{"role", "content"}`, content a list of
            `{"type": "text", "text"}` and `{"type": "image"}`; the last one is the user's.
        images: Its images in order: their files, what a data file holds of them, or, of a row made
            by hand, PIL images.
        answer: The right answer, None where none is given.
        choices: Answers to choose from; empty where none are given.
        place: Where it stands, as its errors say it; None says its line.
    """

    line: int
    messages: tuple[dict[str, Any], ...]
    images: tuple[Path | Inline | Image, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    place: str | None = None

    def refused(self, reason: str) -> DareInputError:
        """The error of a row that cannot be used; `reason` says expected and got."""
        where = self.place or f"line {self.line}"
        where = f"data: {where}" if self.place or self.line else "prompt"
        return DareInputError(f"{where}: {reason}")


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file; blank lines are skipped.

    Image paths are relative to the file's folder and stay inside it.

    Args:
        path: One JSON object a line, UTF-8.

    Raises:
        DareInputError: The file cannot be read or holds no row, or a row is not of the form; the
            text has its line.
    """
    folder = Path(path).parent.resolve()
    rows = [_row(value, line, folder) for line, value in _objects(path)]
    if not rows:
        raise DareInputError(f"data: expected at least one row; got none in {path}")
    return rows


def asked(prompt: str, images: Sequence[str | Path]) -> Row:
    """A row of one question, with image paths as the caller has them.

    Raises:
        DareInputError: An image is none.
    """
    for image in images:
        check_picture(Path(image), "image")
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    return Row(0, ({"role": "user", "content": content},), tuple(map(Path, images)))


def check_picture(file: Path | Inline, where: str) -> tuple[int, int]:
    """Width and height of a picture; reads its beginning only.

    Raises:
        DareInputError: It is none.
    """
    from PIL import Image

    try:
        with Image.open(BytesIO(file.data) if isinstance(file, Inline) else file) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = "bytes that are none" if isinstance(file, Inline) else repr(str(file)[:200])
        raise DareInputError(
            f"data: expected a picture for each path in {where}; got {name} ({str(error)[:200]})"
        ) from error


def _objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DareInputError(f"data: expected a JSON lines file; got {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DareInputError(
                f"data: line {number}: {_FORM}; got {line[:80]!r} ({str(error)[:80]})"
            ) from error
        if not isinstance(value, dict):
            raise DareInputError(f"data: line {number}: {_FORM}; got {line[:80]!r}")
        yield number, value


def _row(value: dict[str, Any], line: int, folder: Path) -> Row:
    bare = Row(line, ())
    unknown = sorted(set(value) - _FIELDS)
    if unknown or ("messages" in value) == ("prompt" in value):
        raise bare.refused(f"{_FORM}; got the keys {sorted(value)}")
    answer, choices = _answers(value, bare)
    if "prompt" in value:
        messages, names = _of_prompt(value, bare)
    else:
        messages, names, said = _of_messages(value, bare)
        if said is not None and answer is not None:
            raise bare.refused(
                'expected one answer; got "answer" and a last message of the assistant'
            )
        answer = answer if said is None else said
    if choices and answer is not None and answer not in choices:
        raise bare.refused(f"answer: expected one of its choices {choices}; got {answer!r}")
    images = tuple(inside(name, folder, bare) for name in names)
    return Row(line, tuple(messages), images, answer, choices)


def _answers(value: dict[str, Any], row: Row) -> tuple[str | None, tuple[str, ...]]:
    answer, choices = value.get("answer"), value.get("choices", [])
    if answer is not None and not (isinstance(answer, str) and answer.strip()):
        raise row.refused(f"answer: expected text; got {answer!r:.80}")
    good = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not good or ("choices" in value and len(set(choices)) < 2):
        raise row.refused(f"choices: expected a list of two or more texts; got {choices!r:.80}")
    if len(set(choices)) != len(choices):
        raise row.refused(f"choices: expected different texts; got {choices!r:.80}")
    return answer, tuple(choices)


def _of_prompt(value: dict[str, Any], row: Row) -> tuple[list[dict[str, Any]], list[str]]:
    prompt = value["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise row.refused(f"prompt: expected text; got {prompt!r:.80}")
    if "image" in value and "images" in value:
        raise row.refused('expected "image" or "images"; got both')
    names = [value["image"]] if "image" in value else value.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise row.refused(f"images: expected a list of paths; got {names!r:.80}")
    content = [*({"type": "image"} for _ in names), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}], names


def _of_messages(
    value: dict[str, Any], row: Row
) -> tuple[list[dict[str, Any]], list[str], str | None]:
    """Messages up to the last of the user, image paths, and what the assistant says after it."""
    given, names = value["messages"], []
    if "image" in value or "images" in value:
        raise row.refused(
            'expected images inside the messages; got "image" or "images" beside them'
        )
    if not isinstance(given, list) or not given:
        raise row.refused(f"messages: expected a list of messages; got {given!r:.80}")
    messages = [_message(one, names, row) for one in given]
    said = None
    if messages[-1]["role"] == "assistant":
        parts = messages.pop()["content"]
        if any(part["type"] == "image" for part in parts):
            raise row.refused("messages: expected an answer of text; got an image in it")
        said = "".join(part["text"] for part in parts)
        if not said.strip():
            raise row.refused("messages: expected text from the assistant; got none")
    if not messages or messages[-1]["role"] != "user":
        raise row.refused("messages: expected the user's message last, or before the answer")
    return messages, names, said


def _message(given: Any, names: list[str], row: Row) -> dict[str, Any]:
    """One message with its content as a list; paths of images are added to `names`."""
    role = given.get("role") if isinstance(given, dict) else None
    content = given.get("content") if isinstance(given, dict) else None
    if role not in _ROLES or not isinstance(content, str | list):
        raise row.refused(
            f'messages: expected {{"role": one of {_ROLES}, "content"}}; got {given!r:.120}'
        )
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
            continue
        paths = [part[key] for key in ("image", "path", "url") if key in part] if kind else []
        if kind != "image" or len(paths) != 1 or not isinstance(paths[0], str):
            raise row.refused(
                'messages: expected {"type": "text", "text"} or {"type": "image", "path"}; got '
                f"{part!r:.120}"
            )
        names.append(paths[0])
        parts.append({"type": "image"})
    return {"role": role, "content": parts}


def inside(name: str, folder: Path, row: Row) -> Path:
    """The file of an image path, which links do not lead out of the folder either.

    Raises:
        DareInputError: It lies outside, or is no picture.
    """
    try:
        file = (folder / name).resolve()
        leaves = Path(name).is_absolute() or not file.is_relative_to(folder)
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise row.refused(f"image: expected a path; got {name!r:.120} ({error})") from error
    if leaves:
        raise row.refused(
            f"image: expected a path inside the file's folder, relative to it; got {name!r:.120}. "
            "Copy the images beside the rows"
        )
    check_picture(file, row.place or f"line {row.line}")
    return file
