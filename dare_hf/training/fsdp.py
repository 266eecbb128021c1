"""Training under FSDP2: routers' buffers, and checkpoints, whole or in parts."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

_KINDS = {"FULL_STATE_DICT": (".bin",), "SHARDED_STATE_DICT": ("_0",)}


@torch.no_grad()
def take_buffers_of_first(modules: Iterable[nn.Module]) -> None:
    """Give every process the first one's buffers, as DDP does before a forward; FSDP2 does not.

    Mean updates and thresholds are running statistics of the rows a process sees.

    Args:
        modules: The active adapter's routers; all processes call this.
    """
    buffers = [buffer for module in modules for buffer in module.buffers()]
    if not buffers:
        return
    joined = torch.cat([buffer.flatten() for buffer in buffers])
    distributed.broadcast(joined, src=0)
    parts = joined.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def fsdp_kind(checkpoint: str | Path) -> str | None:
    """How FSDP wrote a checkpoint, by accelerate's name; None where it did not."""
    names = {file.name for file in Path(checkpoint).iterdir()}
    for kind, ends in _KINDS.items():
        if names & {name + end for name in (FSDP_MODEL_NAME, OPTIMIZER_NAME) for end in ends}:
            return kind
    return None


@contextmanager
def written_as(kind: str | None, accelerator: Any) -> Iterator[None]:
    """Inside, accelerate reads checkpoints of that kind; None leaves it as it is."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if kind is None or plugin is None:
        yield
        return
    fields = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
    before = {name: getattr(plugin, name) for name in fields}
    for name in fields:
        setattr(plugin, name, None)
    plugin.set_state_dict_type(kind)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)
