"""The model of a folder or hub id with its processor, of either kind."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from dare_hf.assets import model_path
from dare_hf.errors import DareInputError
from dare_hf.generation.interleaved import allow_image_tokens
from dare_hf.generation.vq_decoder import DECODER_FILE
from dare_hf.training.quantized import quantization_config
from dare_hf.tuning.prompts import Prompts
from dare_hf.tuning.rows import read_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dare_hf.tuning.rows import Row

EMBEDDED = {"anole": "dare-tiny-anole", "volcano": "dare-tiny-volcano"}


def prepare(
    model: Any,
    rows: str | Path | Sequence[Row],
    processor: Any = None,
    *,
    also: Callable[[Sequence[Row]], None] | None = None,
    load_in_4bit: bool = False,
) -> tuple[Any, Prompts, list[Row]]:
    """Rows, then the processor, then the model: what is refused is refused before weights load.

    Args:
        model: A loaded model; or the name of one, as for `load_processor`.
        rows: A file of them, or what `read_rows` returned.
        processor: The model's; None reads it from the folder the model came from.
        also: A further check of the rows.
        load_in_4bit: As for `load_model`, where a name is given.

    Raises:
        DareInputError: A row, the processor or the model cannot be used; the text says which.
    """
    given = read_rows(rows) if isinstance(rows, str | Path) else list(rows)
    if not given:
        raise DareInputError("rows: expected at least one; got none")
    if also is not None:
        also(given)
    named = isinstance(model, str | Path)
    if processor is None:
        processor = load_processor(str(model)) if named else processor_of(model)
    prompts = Prompts(processor)
    prompts.check(given)
    loaded = load_model(str(model), load_in_4bit=load_in_4bit) if named else model
    return loaded, prompts, given


def load_processor(name: str) -> Any:
    """The processor of a model that sees, the tokenizer of a language model.

    Args:
        name: A folder, a hub id, or an embedded model.

    Raises:
        DareInputError: There is none.
    """
    source = _source(name)
    try:
        sees = _sees(AutoConfig.from_pretrained(source, trust_remote_code=False))
        auto = AutoProcessor if sees else AutoTokenizer
        return auto.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(name, error) from error


def load_model(name: str, *, load_in_4bit: bool = False) -> Any:
    """The model in eval mode, on the accelerator where there is one.

    Args:
        name: As for `load_processor`.
        load_in_4bit: Load the backbone in nf4.

    Raises:
        DareInputError: There is none.
        DareConfigError: bitsandbytes is asked for and not installed.
    """
    source = _source(name)
    settings = {"quantization_config": quantization_config()} if load_in_4bit else {}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        auto = AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM
        model = auto.from_pretrained(source, trust_remote_code=False, **settings).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unreadable(name, error) from error
    if torch.accelerator.is_available() and not load_in_4bit:
        model = model.to(torch.accelerator.current_accelerator())
    return model


def processor_of(model: Any) -> Any:
    """The processor in the folder a model was loaded from.

    Raises:
        DareInputError: It was not loaded from one, or the folder has none.
    """
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise DareInputError(
            "processor: expected the model's processor or tokenizer, since the model was not "
            "loaded from a folder; got None"
        )
    return load_processor(name)


@contextmanager
def as_used(model: Any) -> Iterator[Any]:
    """The model as it is used: one with an image decoder in its folder may draw."""
    name = getattr(model.config, "_name_or_path", "")
    draws = bool(name) and (Path(name) / DECODER_FILE).is_file()
    with allow_image_tokens(model) if draws else nullcontext(), torch.no_grad():
        yield model


def _source(name: str) -> str:
    return str(model_path(EMBEDDED[name])) if name in EMBEDDED else name


def _sees(config: Any) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _unreadable(name: str, error: Exception) -> DareInputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DareInputError(
        f"model: expected a folder or hub id with a model of transformers and its processor; got "
        f"{name!r}: {reason[:200]}"
    )
