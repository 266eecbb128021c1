"""The tuner: makes DARE's routers a method of peft, and routing what its adapters install."""

from __future__ import annotations

import functools
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from dare_hf.architectures.locate import locate
from dare_hf.compat import adapter_methods, adapter_source, call_adapter_method
from dare_hf.config import DareConfig
from dare_hf.engine.active_adapter import ActiveAdapter
from dare_hf.engine.attach import (
    attach,
    check_free,
    new_controller,
    new_router,
    router_shapes,
    unwrap,
    watch_attention,
)
from dare_hf.engine.settings import check_adapter, made_for, resolve
from dare_hf.engine.undo import UndoRecord
from dare_hf.errors import AdapterMismatchError, DareConfigError, DareInputError, DareStateError
from dare_hf.peft_method.layer import NOT_MERGEABLE, RouterLayer
from dare_hf.routers.files import (
    check_made_for,
    check_tensors,
    check_values,
    read_routers,
    routers_of,
    shapes,
    tensors_file,
)
from dare_hf.routers.holder import NAME

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from dare_hf.architectures.locate import Anatomy
    from dare_hf.compat import AdapterSource
    from dare_hf.engine.attach import ModelState
    from dare_hf.engine.settings import Settings

PREFIX = "dare_"


class DareTuner(BaseTuner):
    """Puts routers on a model's decoder layers and routes by the active adapter's.

    Made by peft (`get_peft_model`, `PeftModel.from_pretrained`) and by transformers
    (`model.add_adapter`, `model.load_adapter`, `from_pretrained` of an adapter's folder).
    """

    prefix = PREFIX
    tuner_layer_cls = RouterLayer
    target_module_mapping = {}  # noqa: RUF012 - as peft declares it

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
            raise DareStateError(
                "model: expected a transformers model; got one that peft has wrapped already. "
                "Beside a LoRA adapter use model.add_adapter and model.set_adapter([...]) of "
                "transformers, or apply_dare(model, folder)"
            )
        shared = vars(model).get("peft_config")
        known = set(shared or ())
        try:
            with warnings.catch_warnings():
                # what transformers does for every second adapter, a LoRA beside this one
                warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            for name in set(shared or ()) - known:
                del shared[name]
            if shared is None:
                # transformers 5.23 says so in add_adapter before it knows that it worked
                vars(model).pop("_hf_peft_config_loaded", None)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter's routers; the first one puts routing on the model.

        Args:
            model: The transformers model.
            adapter_name: Key of the adapter's configuration in `peft_config`.
            autocast_adapter_dtype: Not needed: routers are float32.
            low_cpu_mem_usage: Make the routers on the meta device; their weights are loaded next.
            state_dict: Not needed: an adapter has a router on every layer.

        Raises:
            DareConfigError: The configuration does not fit the model.
            DareStateError: The model has DARE by `apply_dare`.
            UnsupportedModelError: The architecture cannot be routed.
            AdapterMismatchError: It was made for another depth, width or architecture, or the file
                it is being loaded from does not hold its tensors.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, DareConfig):
            raise DareConfigError(
                f"peft_config: expected a DareConfig; got {type(config).__name__}"
            )
        anatomy = locate(model)
        check_made_for(config, made_for(anatomy))
        check_adapter(config, present=True)
        # a copy: what it is made for is this adapter's, not the caller's next one's
        config = config.checked(**made_for(anatomy))
        settings = resolve(model, config, anatomy)
        config = settings.config
        source = adapter_source()
        if source is not None:
            _check_source(source, settings, anatomy)
        state = vars(model).get("_dare")
        if state is None or state.owner != "peft":
            check_free(model)
            state = _install(model, settings, anatomy)
        try:
            self._add(state, adapter_name, settings, low_cpu_mem_usage)
            if source is not None or config.inference_mode:
                _adapter(state).await_weights(adapter_name)
            if source is not None and source.direct:
                _watch_arrival(model, state, adapter_name)
        except BaseException:
            drop_adapter(model, adapter_name)
            raise
        self.peft_config[adapter_name] = config

    def _add(self, state: ModelState, name: str, settings: Settings, on_meta: bool) -> None:
        anatomy = state.controller.anatomy
        holders = _holders(state)
        trained = [(p, p.requires_grad) for holder in holders for p in holder.parameters()]
        for index, holder in enumerate(holders):
            holder.check_name(name)
            router = new_router(settings, anatomy, index)
            holder[name] = router.to("meta") if on_meta else router
        _adapter(state).settings[name] = settings
        for holder in holders:
            holder.set_adapter(self.active_adapters, settings.config.inference_mode)
        # adding an adapter leaves the others as trainable as they were, as peft does
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        watch_attention(state, settings)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; with the last one routing is taken off the model.

        Raises:
            ValueError: There is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        first = _holders(cast("Any", self.model)._dare)[0]
        # not peft's own loop: it skips every module with the prefix in its name, so all holders
        drop_adapter(self.model, adapter_name)
        self.active_adapter = list(first.active_adapters)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        model = super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        if "_dare" in vars(model):
            _detach(model)
        return model

    def _check_merge_allowed(self) -> None:
        raise DareStateError(NOT_MERGEABLE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PeftModel around forward and generate."""
        if kwargs.get("adapter_names") is not None:
            raise DareInputError(
                "adapter_names: expected none, a forward is routed by one adapter; got one for "
                "each row. Call model.set_adapter(name) and run the rows of one adapter together"
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Peft's key translation; refuses tensors that are not exactly this model's routers'."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        place = f".{NAME}.{adapter_name}."
        own = [(key, value) for key, value in model.state_dict().items() if place in key]
        try:
            check_tensors(shapes(found.items()), shapes(own))
            check_values(found.items())
        except AdapterMismatchError:
            _drop_untouched(model, adapter_name)
            raise
        return found

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("routers replace no module")


def _install(model: Any, settings: Settings, anatomy: Anatomy) -> ModelState:
    """Routing without an adapter yet: empty router holders, the base model frozen."""
    undo = UndoRecord()
    first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    try:
        for parameter in model.parameters() if first else ():
            undo.freeze(parameter)
        controller = new_controller(settings, anatomy)
        state = attach(model, controller, undo, owner="peft")
        for layer in anatomy.layers:
            undo.child(layer, NAME, RouterLayer(layer))
        controller.adapter = ActiveAdapter(anatomy.layers)
        for name in adapter_methods():
            undo.put(model, name, functools.partial(call_adapter_method, name))
        if hasattr(model, "delete_adapter"):
            undo.put(model, "delete_adapter", _delete_adapter)
    except BaseException:
        undo.undo()
        undo.thaw()
        raise
    return state


def _holders(state: ModelState) -> list[RouterLayer]:
    layers = state.controller.anatomy.layers
    return [cast("RouterLayer", layer.get_submodule(NAME)) for layer in layers]


def _adapter(state: ModelState) -> ActiveAdapter:
    return cast("ActiveAdapter", state.controller.adapter)


def _delete_adapter(model: Any, adapter_names: list[str] | str) -> None:
    """Transformers' delete_adapter on a model with routers; the last one takes routing off."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    delete = adapter_methods().get("delete_adapter", type(model).delete_adapter)
    delete(model, names)
    for name in names:
        drop_adapter(model, name)


def drop_adapter(model: Any, name: str) -> None:
    """Forget an adapter; without any left routing is taken off the model."""
    state = vars(model).get("_dare")
    if state is None:
        return
    for holder in _holders(state):
        if name in holder:
            holder.delete_adapter(name)
    settings = _adapter(state).settings
    settings.pop(name, None)
    _adapter(state).awaiting.pop(name, None)
    if not settings:
        _detach(model)


def _check_source(source: AdapterSource, settings: Settings, anatomy: Anatomy) -> None:
    """Refuse weights that do not fit before anything is put on the model for them."""
    wanted = router_shapes(settings, anatomy)
    if source.tensors is not None:
        routers_of(source.tensors, wanted)
    elif source.place is not None:
        read_routers(tensors_file(source.place, **source.hub), wanted)


def _watch_arrival(model: Any, state: ModelState, name: str) -> None:
    """Let transformers' load of the weights take the adapter off again when it fails.

    It only logs names that fit nothing (5.24; so deepseek_ocr2's, a LoRA's as well).
    """
    undo, load = UndoRecord(), model._load_pretrained_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        undo.undo()
        try:
            loaded = load(*args, **kwargs)
            _adapter(state).check_loaded(name)
        except BaseException:
            _forget(model, model, name)
            raise
        return loaded

    undo.set(model, "_load_pretrained_model", watched)


def _drop_untouched(model: Any, name: str) -> None:
    """Take an adapter off whose file does not fit, if it is on the model for that file alone."""
    target = unwrap(model)
    adapter = _adapter(target._dare)
    try:
        adapter.check_loaded(name)
    except AdapterMismatchError:
        _forget(model, target, name)


def _forget(model: Any, target: Any, name: str) -> None:
    """Take an adapter off `target` that came by a load into `model`, which failed."""
    model.peft_config.pop(name, None)
    drop_adapter(target, name)


def _detach(model: Any) -> None:
    """Take routing off: the model is what it was; under a LoRA it stays frozen."""
    undo = model._dare.undo
    undo.undo()
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return
    undo.thaw()
    if not vars(model).get("peft_config", True):
        del model.peft_config
        # transformers 5.24 says so before it knows that the load worked
        vars(model).pop("_hf_peft_config_loaded", None)
