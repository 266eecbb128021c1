"""A folder that transformers loads, written shard by shard and only when all of it fits."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from dare_hf.convert.source import tensors
from dare_hf.errors import DareInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

Shape = tuple[int, ...]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the block ends without an error, and vanishes else.

    Raises:
        DareInputError: `out` exists, or cannot be made.
    """
    if out.exists():
        raise DareInputError(
            f"convert: expected an OUT that does not exist; got {str(out)!r}. Nothing is "
            "overwritten: remove it, or name another"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DareInputError(f"convert: expected an OUT to write to; got {error}") from error
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_names(found: Mapping[str, Shape], wanted: Mapping[str, Shape], model: str) -> None:
    """Refuse tensors that are not exactly those a model has.

    Args:
        found: Name -> shape of the source, renamed as the target has it.
        wanted: Name -> shape of the target.
        model: What the target is, for the text.

    Raises:
        DareInputError: A name is missing, foreign, or of another shape; the text says which.
    """
    missing = sorted(set(wanted) - set(found))
    foreign = sorted(set(found) - set(wanted))
    if missing or foreign:
        parts = [_few(missing, "without"), _few(foreign, "and beside them")]
        raise DareInputError(
            f"convert: expected the tensors of {model}; got a checkpoint "
            f"{' '.join(part for part in parts if part)}"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise DareInputError(
                f"convert: expected {name} of shape {list(shape)}, as config.json says; got "
                f"{list(found[name])}"
            )


def _few(names: list[str], word: str) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{word} {', '.join(names[:5])}{more}" if names else ""


def write_tensors(
    files: Sequence[Path], folder: Path, change: Callable[[str, Tensor], tuple[str, Tensor] | None]
) -> None:
    """Write one file of safetensors for each file of the source, and their index.

    Args:
        files: Files of the source; one is in memory at a time.
        folder: Where to.
        change: Name and tensor of the source -> those of the target, or None to leave it out.
    """
    index: dict[str, str] = {}
    total = 0
    for number, path in enumerate(files):
        shard = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        changed = (change(name, tensor) for name, tensor in tensors(path))
        # copies: a file may hold views into one storage, which safetensors does not take
        layout = torch.contiguous_format
        state = {pair[0]: pair[1].clone(memory_format=layout) for pair in changed if pair}
        if not state:
            continue
        save_file(state, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(state, shard)
        total += sum(tensor.nbytes for tensor in state.values())
    text: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": index}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
