"""Operations of torch and waits for the device, counted: figures that no busy machine disturbs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from dare_hf.benchmark.race import run_once
from dare_hf.benchmark.systems import on_systems, random_subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dare_hf.benchmark.figures import Row
    from dare_hf.benchmark.random_llava import Setting
    from dare_hf.benchmark.systems import System

_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
_STEPS = 4


class Operations(TorchDispatchMode):
    """Counts operations that compute, views left out.

    Attributes:
        count: How many.
        waits: How many of them the host has to wait for: it reads a value or a size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, counted."""
        found = func(*args, **(kwargs or {}))
        self.count += not func.is_view
        self.waits += func.name() in _WAITS or _leaves_device(func, args, found)
        return found


def _leaves_device(func: Any, args: tuple, found: Any) -> bool:
    """Whether a copy takes values from the device to the host."""
    if func.name() == "aten::copy_":
        source, target = args[1], args[0]
    elif func.name() == "aten::_to_copy":
        source, target = args[0], found
    else:
        return False
    return source.device.type != "cpu" and target.device.type == "cpu"


def per_layer(setting: Setting, names: Sequence[str]) -> list[Row]:
    """Operations and waits that one more layer adds, to a prefill and to a decode step.

    Args:
        setting: At which size; two models are built, the one with a layer more.
        names: The systems.
    """
    fewer, more = (
        _counted(replace(setting, layers=layers), names)
        for layers in (setting.layers, setting.layers + 1)
    )
    return [
        {"system": name, **{key: b[key] - a[key] for key in a}}
        for name, a, b in zip(names, fewer, more, strict=True)
    ]


def _counted(setting: Setting, names: Sequence[str]) -> list[dict[str, int]]:
    subject = random_subject(setting)
    inputs = subject.inputs(setting)
    with on_systems(subject, names) as systems:
        return [_phases(system, inputs, subject.options) for system in systems]


def _phases(system: System, inputs: dict[str, Any], options: dict[str, Any]) -> dict[str, int]:
    """Of the forwards of a generate: the first, and the last."""
    found = list[Operations]()

    def enter(module: Any, args: Any) -> None:
        found.append(Operations())
        found[-1].__enter__()

    def leave(module: Any, args: Any, output: Any) -> None:
        found[-1].__exit__(None, None, None)

    handles = [
        system.model.register_forward_pre_hook(enter, prepend=True),
        system.model.register_forward_hook(leave, always_call=True),
    ]
    try:
        run_once(system, inputs, _STEPS, **options)
    finally:
        for handle in handles:
            handle.remove()
    first, last = found[0], found[-1]
    return {
        "prefill_operations": first.count,
        "prefill_waits": first.waits,
        "decode_operations": last.count,
        "decode_waits": last.waits,
    }
