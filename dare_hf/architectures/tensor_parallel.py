"""Attention heads that tensor parallelism has spread over processes: means over all of them.

Every process holds some heads of a layer, and the whole hidden state. What is scored by heads has
to be the mean over all of them, or each process would keep other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from dare_hf.architectures.locate import attention_of
from dare_hf.routing.scores import HeadMean, local_mean

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from dare_hf.architectures.locate import Anatomy


@dataclass(frozen=True)
class SharedHeads:
    """The mean over the heads of a layer that several processes hold together.

    Every process of the group has to call it, in the same order; all get the same bits.

    Attributes:
        group: Those processes.
        size: How many they are.
    """

    group: ProcessGroup
    size: int

    def __call__(self, total: Tensor, heads: int) -> Tensor:
        """The mean over all heads.

        Args:
            total: Sum over this process's heads, of any shape.
            heads: How many they are.
        """
        joined = torch.cat([total.flatten(), total.new_full((1,), heads)])
        dist.all_reduce(joined, group=self.group)
        return joined[:-1].view_as(total) / joined[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHeads:
        return self  # a copy of the model lives in the same processes


def shared_heads(attention: nn.Module, model: nn.Module) -> SharedHeads | None:
    """Who holds the heads of `attention` together with this process; None where all are here.

    Args:
        attention: A self-attention of `model`.
        model: Its model, tensor-parallel by transformers or by torch's parallelize_module, or not.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    found: list[Any] = [p for p in attention.parameters() if hasattr(p, "device_mesh")]
    for parameter in found:
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_shard() and _splits_heads(mesh, dimension, model):
                return SharedHeads(mesh.get_group(dimension), mesh.size(dimension))
    return None


def head_mean(shared: SharedHeads | None) -> HeadMean:
    """How a sum over this process's heads becomes the mean over all heads."""
    return local_mean if shared is None else shared


def kv_shares(anatomy: Anatomy) -> list[int]:
    """For each layer how many processes store its keys between them; 1 where each stores all."""
    model: Any = anatomy.hooked[0]
    plan = getattr(model, "tp_plan", None) or {}
    style = plan.get(f"{anatomy.spec.layers}.*.{anatomy.spec.key_projection}", "colwise")
    if style != "colwise":  # gathered again before attention sees them
        return [1] * len(anatomy.layers)
    shared = [shared_heads(attention_of(layer), model) for layer in anatomy.layers]
    return [1 if heads is None else heads.size for heads in shared]


def share_note(shares: list[int]) -> list[str]:
    """What a report says where `kv_shares` are shares."""
    if max(shares, default=1) == 1:
        return []
    return [
        f"tensor parallelism over {max(shares)} processes: bytes are those of this process, FLOPs "
        "those of all together"
    ]


def _splits_heads(mesh: DeviceMesh, dimension: int, model: nn.Module) -> bool:
    """Whether a mesh dimension is tensor parallelism, not the sharding of FSDP."""
    if mesh.mesh_dim_names is not None:
        return mesh.mesh_dim_names[dimension] == "tp"
    from torch.distributed.fsdp import FSDPModule

    return not any(isinstance(module, FSDPModule) for module in model.modules())
