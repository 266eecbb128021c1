"""Which adapter routes now, and the settings and learned rates that come with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dare_hf.errors import AdapterMismatchError, DareStateError
from dare_hf.routers.holder import NAME, OFFLOADED, active_routers, holder_of
from dare_hf.routers.router import rate_row
from dare_hf.routers.sharded import in_parts, whole
from dare_hf.routing.retention import learned_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from dare_hf.engine.settings import Settings
    from dare_hf.routers.router import Router
    from dare_hf.routing.retention import RetentionTable


class ActiveAdapter:
    """Follows the adapter that peft, or `apply_dare`, has made active on a model's layers.

    Args:
        layers: The decoder layers; each has a router holder.

    Attributes:
        settings: What each adapter's configuration means on this model, by adapter name.
        awaiting: Adapters whose weights a file is to bring: each router's fresh weight and its
            version, by which `changed` knows that it came.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self.settings: dict[str, Settings] = {}
        self.awaiting: dict[str, list[tuple[Tensor, int | None]]] = {}
        self._current: Settings | None = None
        self._read: list[tuple[Tensor, int | None]] = []
        self._values: Tensor | None = None

    @property
    def name(self) -> str | None:
        """Name of the active adapter, None without one."""
        holder = holder_of(self._layers[0])
        return None if holder is None else holder.active_name

    @property
    def running(self) -> bool:
        """Whether an adapter is active and switched on; else the model is the plain one."""
        holder = holder_of(self._layers[0])
        return holder is not None and holder.switched_on and holder.active_name is not None

    @property
    def routers(self) -> list[Router] | None:
        """The active adapter's router of each layer; None without one."""
        return active_routers(self._layers)

    def changed(self) -> Settings | None:
        """The settings to use from now on; None where those in use still hold.

        Learned rates are read again when a parameter is another one or was written to: no copy
        from a device otherwise. On the CPU, where reading costs no copy, their values are compared;
        not those of which FSDP2 keeps each process a part, which all processes read together.

        Raises:
            AdapterMismatchError: The adapter was loaded, but its file held no weights for a layer.
        """
        name, routers = self.name, self.routers
        if name is None or routers is None:
            return None
        self.check_loaded(name)
        settings = self.settings[name]
        if not settings.config.learns_rates:
            if settings is self._current:
                return None
            self._current, self._read = settings, []
            return settings
        if settings is self._current and not self._written(routers):
            return None
        self._current = settings
        return replace(settings, table=self._table(routers, settings))

    def await_weights(self, name: str) -> None:
        """Note that a file is to bring the weights of adapter `name`, which is fresh."""
        self.awaiting[name] = [(weight, _version(weight)) for weight in self._weights(name)]

    def _weights(self, name: str) -> list[Tensor]:
        return [layer.get_parameter(f"{NAME}.{name}.weight") for layer in self._layers]

    def check_loaded(self, name: str) -> None:
        """Note that the weights of adapter `name` came, if a file was to bring them.

        Raises:
            AdapterMismatchError: It held none for a layer.
        """
        fresh = self.awaiting.get(name)
        if fresh is None:
            return
        now = self._weights(name)
        pairs = enumerate(zip(now, fresh, strict=True))
        missing = [i for i, (own, (w, v)) in pairs if own is w and _version(own) == v]
        if missing:
            raise AdapterMismatchError(
                f"adapter {name!r}: expected weights from its file for every layer; the routers of "
                f"layers {missing} are still the random ones. The names in the file did not fit (a "
                "report was logged while loading): try apply_dare(model, folder). To train a fresh "
                "adapter, leave inference_mode of its configuration at False"
            )
        del self.awaiting[name]

    def _written(self, routers: list[Router]) -> bool:
        logits = [_logits(router) for router in routers]
        values = _stacked(logits)
        if values is not None:
            return self._values is None or not torch.equal(values, self._values)
        now = [(tensor, _version(tensor)) for tensor in logits]
        pairs = zip(now, self._read, strict=False)
        return not self._read or any(a is not b or v != w for (a, v), (b, w) in pairs)

    def _table(self, routers: list[Router], settings: Settings) -> RetentionTable:
        logits = [_logits(router) for router in routers]
        self._read = [(tensor, _version(tensor)) for tensor in logits]
        self._values = _stacked(logits)
        return rates_learned(logits, settings)


def rates_learned(logits: Sequence[Tensor], settings: Settings) -> RetentionTable:
    """The table of rates that an adapter has learned.

    Args:
        logits: For each layer [hops, 2] rate logits.
        settings: What the adapter's configuration means on the model.
    """
    same_place = len({tensor.device for tensor in logits}) == 1
    with torch.no_grad():
        stacked = torch.stack(list(logits if same_place else [tensor.cpu() for tensor in logits]))
        rates = torch.sigmoid(whole(stacked).float()).double().tolist()
    count = len(rates[0])
    by_hop = [[layer[rate_row(hop, count)] for layer in rates] for hop in range(count)]
    table = learned_table(
        by_hop, plan_every=settings.config.plan_every, first_whole=settings.first_whole
    )
    return table.following(settings.sources)


def _logits(router: Router) -> Tensor:
    """[hops, 2] rate logits, wherever accelerate's offload hook keeps them."""
    logits: Tensor = router.rate_logits
    hook = getattr(router, "_hf_hook", None)
    if logits.device.type == "meta" and getattr(hook, "weights_map", None) is not None:
        try:
            return hook.weights_map["rate_logits"]
        except KeyError as error:
            raise DareStateError(OFFLOADED) from error
    return logits


def _stacked(logits: Sequence[Tensor]) -> Tensor | None:
    """Float32[layers, hops, 2] rate logits where they are all whole on the CPU, else None."""
    if any(tensor.device.type != "cpu" or in_parts(tensor) for tensor in logits):
        return None
    return torch.stack([tensor.detach() for tensor in logits])


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; inference tensors do not say."""
    return None if tensor.is_inference() else tensor._version
