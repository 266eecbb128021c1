"""The router holder of a layer, as peft sees it: a tuner layer beside HF's own modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer

from dare_hf.errors import DareConfigError, DareStateError
from dare_hf.routers.holder import RouterHolder, device_of

if TYPE_CHECKING:
    import torch
    from torch import nn

NOT_MERGEABLE = (
    "expected weights that can be merged; routers decide which tokens run and change no weight of "
    "the base model. Save the adapter and load it beside the model, or call unload() to drop it"
)


class RouterLayer(RouterHolder, BaseTunerLayer):
    """The routers of one decoder layer, one per adapter of peft's.

    It wraps no module: LoRA injection goes past it, HF's layer keeps its class and its place. Its
    keys are `dare_router.<adapter>.<name>`, since transformers (5.23, `load_adapter`) puts the
    adapter's name right behind the part that holds peft's prefix "dare_".

    Args:
        layer: The decoder layer it sits on; tells where adapters that are loaded go.
    """

    adapter_layer_names = ("routers_by_name",)
    # peft reads these of a wrapped layer; here is none
    weight: Any = None
    bias: Any = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no child module

    @property
    def routers_by_name(self) -> RouterLayer:
        """The routers by adapter name: this module itself."""
        return self

    @property
    def active_name(self) -> str | None:
        """Name of the router adapter among peft's active ones, None where there is none."""
        return next((name for name in self.active_adapters if name in self), None)

    @property
    def switched_on(self) -> bool:
        """Whether peft's adapters are switched on."""
        return not self.disable_adapters

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter active; names of other methods' adapters may stand beside it.

        Raises:
            DareStateError: Two router adapters are named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        own = [name for name in names if name in self]
        if len(own) > 1:
            raise DareStateError(
                f"set_adapter: expected one router adapter (LoRA adapters may be named beside it); "
                f"got {own}. A layer has one router at a time: name one of them"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def check_name(self, name: str) -> None:
        """Refuse a name that cannot be a child module's.

        Raises:
            DareConfigError: It is an attribute of the module, or holds a dot.
        """
        if name and "." not in name and (name in self or not hasattr(self, name)):
            return
        raise DareConfigError(
            f"adapter_name: expected a name without dots that torch modules do not use themselves; "
            f"got {name!r}. Choose another name"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: there is nothing to merge.

        Raises:
            DareStateError: Always.
        """
        raise DareStateError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Refused: nothing is merged.

        Raises:
            DareStateError: Always.
        """
        raise DareStateError(NOT_MERGEABLE)

    def _get_base_layer_device_and_dtype(
        self, base_layer: Any
    ) -> tuple[torch.device, torch.dtype | None]:
        return device_of(self._layer[0]), None  # routers stay float32
