"""The model and the configuration that a prediction is about; nothing of either is run."""

from __future__ import annotations

import os
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from dare_hf.architectures.locate import locate
from dare_hf.architectures.tensor_parallel import kv_shares
from dare_hf.config import DareConfig
from dare_hf.config.dare_config import PRESETS
from dare_hf.engine.active_adapter import rates_learned
from dare_hf.engine.attach import router_shapes, unwrap
from dare_hf.engine.settings import exempt_layers, made_for, rates_of, resolve, stored_shapes
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.hops.ledger import LedgerRules
from dare_hf.report.flops import LayerShape
from dare_hf.routers.files import check_made_for, read_config, read_routers, tensors_file
from dare_hf.scoring.base import make_scorer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dare_hf.architectures.locate import Anatomy

    Source = nn.Module | Sequence[LayerShape]
    Config = DareConfig | str | os.PathLike[str] | None

# Bytes of an element where only shapes are given: bfloat16 and float16.
_HALF = 2


@dataclass(frozen=True)
class Subject:
    """What a prediction is made from.

    Attributes:
        shapes: One per decoder layer that runs.
        rules: Rates and settings.
        sources: For each layer the one whose keys it reads.
        itemsize: Bytes of one element of the cache.
        anatomy: Where the layers are; None where only shapes are known.
    """

    shapes: tuple[LayerShape, ...]
    rules: LedgerRules
    sources: tuple[int, ...]
    itemsize: int
    anatomy: Anatomy | None

    @classmethod
    def of(cls, source: Source, config: Config, itemsize: int | None) -> Subject:
        """Read a model or shapes, and a configuration.

        Raises:
            DareConfigError: The configuration does not fit, or needs an adapter that is not there.
            DareInputError: It is neither a model nor shapes.
            UnsupportedModelError: The architecture cannot be routed.
        """
        if isinstance(source, nn.Module):
            return cls._of_model(unwrap(source), config, itemsize)
        shapes = tuple(source) if isinstance(source, (list, tuple)) else ()
        if not shapes or not all(isinstance(shape, LayerShape) for shape in shapes):
            raise DareInputError(
                f"model: expected a model or a LayerShape for each layer; got {source!r}"
            )
        if not all(shape.kv_heads or shape.latent for shape in shapes):
            raise DareInputError(
                "model: expected shapes of layers that own their keys; got one that reads those of "
                "another (kv_heads=0), and shapes do not say whose. Pass the model"
            )
        settings, file = _read(config)
        if settings.learns_rates or file is not None:
            raise DareConfigError(
                "config: expected rates that a schedule says; got learned ones, which belong to a "
                "model. Pass the model"
            )
        sources = tuple(range(len(shapes)))
        table = rates_of(settings, sources, make_scorer(settings, (None, "")))
        return cls(shapes, LedgerRules(settings, table, {}), sources, itemsize or _HALF, None)

    @classmethod
    def _of_model(cls, model: Any, config: Config, itemsize: int | None) -> Subject:
        state = vars(model).get("_dare")
        if state is not None and config is None:
            controller = state.controller
            controller.follow_adapter()
            anatomy = controller.anatomy
            rules = LedgerRules(controller.config, controller.table, controller.exempt)
        else:
            anatomy = locate(model)
            rules = _rules(model, anatomy, config)
        shapes = stored_shapes(anatomy, kv_shares(anatomy))
        # transformers leaves after config.num_hidden_layers
        count = getattr(anatomy.text_config, "num_hidden_layers", len(anatomy.layers))
        ran = sum(slot < count for slot in anatomy.slots)
        parameters = anatomy.layers[0].parameters()
        dtype = next(p.dtype for p in parameters if p.is_floating_point())
        return cls(
            tuple(shapes[:ran]), rules, anatomy.sources[:ran], itemsize or dtype.itemsize, anatomy
        )

    def plain(self) -> tuple[LayerShape, ...]:
        """The layers as transformers runs them without DARE, windows kept to."""
        if self.anatomy is None:
            return self.shapes
        own = [LayerShape.of(m, self.anatomy.text_config) for m in self.anatomy.layers]
        pairs = zip(own, self.shapes, strict=False)
        return tuple(replace(shape, kv_shares=stored.kv_shares) for shape, stored in pairs)


def _rules(model: Any, anatomy: Anatomy, config: Config) -> LedgerRules:
    config, file = _read(config)
    check_made_for(config, made_for(anatomy))
    if config.learns_rates and file is None:
        raise DareConfigError(
            "schedule: expected rates that are known before a run; got 'learned' without an "
            "adapter. Pass the adapter's folder, or a model that has it and no config"
        )
    settings = resolve(model, config, anatomy)
    table = settings.table
    if config.learns_rates and file is not None:
        tensors = read_routers(file, router_shapes(settings, anatomy))
        table = rates_learned([own["rate_logits"] for own in tensors], settings)
    return LedgerRules(settings.config, table, exempt_layers(anatomy))


def _read(config: Config) -> tuple[DareConfig, Path | None]:
    """A configuration without its delimiters, which close hops and prune nothing themselves."""
    file = None
    if isinstance(config, str) and config in PRESETS:
        config = DareConfig.preset(config)
    elif isinstance(config, (str, os.PathLike)):
        source = os.fspath(config)
        config = read_config(source)
        file = tensors_file(source) if config.learns_rates else None
    found = DareConfig() if config is None else config
    if not isinstance(found, DareConfig):
        raise DareConfigError(
            "config: expected a DareConfig, a preset's name, an adapter's folder or hub id, or "
            f"None; got {type(found).__name__}"
        )
    if found.decode != "full":
        raise DareConfigError(
            "decode: expected 'full', under which counts say how many sampled tokens are stored; "
            f"got {found.decode!r}. Leave decode at its default"
        )
    found = copy(found)
    found.hop_delimiters = ()
    return found, file
