"""The routers of one decoder layer: its child module `dare_router`."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dare_hf.errors import DareStateError
from dare_hf.routers.router import Router

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

# The child's name on a decoder layer; every parameter key holds peft's prefix "dare_" through it.
NAME = "dare_router"

OFFLOADED = (
    "expected the routers' weights where offload hooks of accelerate look for them, in the model's "
    "state_dict; an adapter that apply_dare has read is not part of it. Put the offload hooks on "
    "before apply_dare(model, folder), or load the adapter with model.load_adapter(folder)"
)

"""Why routers that an offload has taken away cannot run."""


class RouterHolder(nn.ModuleDict):
    """The routers of one decoder layer by adapter name.

    A child beside HF's own modules, so that `.to()`, device maps, `state_dict` and FSDP see it.
    Attributes have names of two words: torch takes no child module, so no adapter, by the name of
    an attribute.
    """

    @property
    def active_name(self) -> str | None:
        """Name of the adapter that routes now, None without one."""
        return next(iter(self.keys()), None)

    @property
    def switched_on(self) -> bool:
        """Whether the adapter is switched on."""
        return True

    @property
    def active_router(self) -> Router | None:
        """The active adapter's router."""
        name = self.active_name
        return None if name is None else cast("Router", self[name])


class AppliedRouters(RouterHolder):
    """The single adapter that `apply_dare(model, folder)` has read.

    It is no part of the model's checkpoint: `state_dict` leaves it out, and loading one into the
    model does not ask for it.
    """

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Add nothing to what the model saves."""
        return OrderedDict() if destination is None else destination

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, tensor in super().state_dict().items():
            state_dict.setdefault(prefix + name, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def holder_of(layer: nn.Module) -> RouterHolder | None:
    """The router holder of a decoder layer, None where it has none."""
    return cast("RouterHolder | None", layer._modules.get(NAME))


def active_routers(layers: Iterable[nn.Module]) -> list[Router] | None:
    """The active adapter's router of each layer; None without one."""
    holders = [holder_of(layer) for layer in layers]
    routers = [None if holder is None else holder.active_router for holder in holders]
    return None if None in routers else cast("list[Router]", routers)


def mean_update_of(layer: nn.Module) -> Tensor | None:
    """Float32[2, D] mean update of a layer by the active adapter; None where it has none.

    Raises:
        DareStateError: An offload has taken it away.
    """
    router = _router_of(layer)
    return None if router is None else _at_hand(router.mean_update)


def thresholds_of(layer: nn.Module) -> Tensor:
    """Float32[hops, 2] thresholds of a layer by the active adapter, which has them.

    Raises:
        DareStateError: An offload has taken them away.
    """
    router = _router_of(layer)
    assert router is not None
    thresholds = _at_hand(router.thresholds)
    assert thresholds is not None
    return thresholds


def _router_of(layer: nn.Module) -> Router | None:
    holder = holder_of(layer)
    return None if holder is None else holder.active_router


def _at_hand(tensor: Tensor | None) -> Tensor | None:
    if tensor is not None and tensor.device.type == "meta":
        raise DareStateError(OFFLOADED)
    return tensor


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes: its weights' device, the hook's where accelerate has taken them."""
    for name, parameter in layer.named_parameters():
        if not name.startswith(NAME) and parameter.device.type != "meta":
            return parameter.device
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "cpu"))
