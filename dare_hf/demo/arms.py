"""Which arm a command line asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_hf.assets import adapter_names, adapter_path
from dare_hf.demo.embedded import demo_config, runner_type, safe_config
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.evaluation.arm import Arm, checked_lora, trained_arm

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_ADAPTER = "dare-lh"


def demo_arm(model: str, processor: Any, ends: Sequence[int], **options: Any) -> Arm:
    """As `choose_arm`; where no option is given the shipped adapter.

    A model that has its own way without training and no adapter yet is pruned in that way.
    """
    kind = runner_type(model)
    if not any(options.values()):
        shipped = kind.training_free is None or DEFAULT_ADAPTER in adapter_names(kind.folder)
        options = {"adapter": DEFAULT_ADAPTER} if shipped else {"training_free": True}
    return choose_arm(model, processor, ends, **options)


def choose_arm(
    model: str,
    processor: Any,
    ends: Sequence[int],
    *,
    adapter: str | None = None,
    lora: Path | None = None,
    training_free: bool = False,
    safe: bool = False,
) -> Arm:
    """The arm that options name; without any the plain model.

    Args:
        model: Name of an embedded model.
        processor: Its processor.
        ends: Ids of which one has to end hops in the task; the first does where nothing is trained.
        adapter: A shipped adapter's name, or a folder that `dare-hf train` wrote.
        lora: Folder of a LoRA; with an adapter: instead of the LoRA beside it.
        training_free: The rates shipped beside the model, found without training.
        safe: The preset "safe".

    Raises:
        DareConfigError: More than one way of pruning is asked for.
        DareInputError: There is no such adapter or LoRA.
    """
    asked = {"--adapter": adapter, "--training-free": training_free, "--safe": safe}
    given = [option for option, value in asked.items() if value]
    if len(given) > 1:
        raise DareConfigError(f"expected one of {', '.join(asked)}; got {' and '.join(given)}")
    if adapter is not None:
        folder = _adapter_folder(runner_type(model).folder, adapter)
        return trained_arm(Path(adapter).name, folder, lora=lora, ends=ends)
    tuned = None if lora is None else checked_lora(lora)
    if not given:
        return Arm("full" if tuned is None else "full with LoRA", lora=tuned)
    config = safe_config(processor, model) if safe else demo_config(processor, model)
    config = replace(config, hop_delimiters=tuple(ends[:1]))
    return Arm("safe" if safe else "training-free", config, lora=tuned)


def _adapter_folder(model: str, adapter: str) -> Path:
    shipped = adapter_names(model)
    if adapter in shipped:
        return adapter_path(model, adapter)
    if Path(adapter).is_dir():
        return Path(adapter)
    raise DareInputError(
        f"adapter: expected one shipped for {model} ({', '.join(shipped) or 'there is none'}) or "
        f"a folder that `dare-hf train` wrote, got {adapter!r}. Without an adapter: --training-free"
    )
