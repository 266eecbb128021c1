"""The registry of supported architectures and the search for a model's decoder layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dare_hf.architectures.spec import ModelSpec
from dare_hf.architectures.supported import REFUSED, SUPPORTED
from dare_hf.architectures.text_models import TEXT_REFUSED, TEXT_SUPPORTED
from dare_hf.compat import broken, check_takes_cache
from dare_hf.errors import UnsupportedModelError, alike

if TYPE_CHECKING:
    from torch import Tensor, nn

SUPPORT_PAGE = "docs/supported-models.md"

SPECS: dict[str, ModelSpec] = {spec.model_type: spec for spec in (*SUPPORTED, *TEXT_SUPPORTED)}
REFUSALS: dict[str, str] = {**REFUSED, **TEXT_REFUSED}
"""model_type -> why it cannot be routed."""

_ATTENTION = ("self_attn", "mixer", "attention", "attn", "self_attention")
"""Names of a layer's self-attention, in the order they are looked for."""

ROUTABLE_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of one model instance are.

    Attributes:
        spec: The architecture's data.
        layers: The decoder layers, in order.
        text_model: The module that owns the layers and runs them.
        text_config: The config of that module.
        hooked: The modules whose forward opens a routing context, outermost first.
        slots: For each of `layers` its index in the model's cache.
        unrouted: Decoder layers without self-attention, or with one whose keys an indexer picks,
            which every token runs.
        sources: For each of `layers` the one whose keys and values its attention reads: itself, or
            an earlier one where layers share them.
    """

    spec: ModelSpec
    layers: tuple[nn.Module, ...]
    text_model: nn.Module
    text_config: Any
    hooked: tuple[nn.Module, ...]
    slots: tuple[int, ...] = ()
    unrouted: tuple[nn.Module, ...] = ()
    sources: tuple[int, ...] = ()

    @property
    def shares(self) -> bool:
        """Whether some layers read the keys of others."""
        return any(source != layer for layer, source in enumerate(self.sources))

    def scored(self, hidden: Tensor) -> Tensor:
        """What scorers see of the hidden states that enter a layer, [B, S, D]."""
        return hidden[self.text_config.altup_active_idx] if self.spec.streams else hidden


def find_spec(model_type: str | None) -> ModelSpec:
    """The spec of a `model_type`.

    Raises:
        UnsupportedModelError: Nothing is known about this architecture, or transformers itself
            cannot run it.
    """
    if model_type in REFUSALS:
        raise UnsupportedModelError(
            f"expected a model whose decoder layers can leave out tokens; {model_type!r} "
            f"cannot be routed: {REFUSALS[model_type]}. See {SUPPORT_PAGE}"
        )
    if reason := broken(model_type):
        raise UnsupportedModelError(
            f"expected a version of transformers that can run {model_type!r}; the one in use fails "
            f"with or without DARE: {reason}. Install another version: see {SUPPORT_PAGE}"
        )
    spec = SPECS.get(model_type or "")
    if spec is None:
        raise UnsupportedModelError(
            f"expected a model whose config.model_type is one of the {len(SPECS)} that "
            f"{SUPPORT_PAGE} lists; got {model_type!r}{alike(model_type, SPECS)}. DARE refuses "
            "models it was not tested on rather than prune them wrongly"
        )
    return spec


def locate(model: nn.Module) -> Anatomy:
    """Find the decoder layers of `model` and check that each of them can be routed.

    Raises:
        UnsupportedModelError: The architecture is unknown, a layer is of an unknown kind, or takes
            its cache by an unknown name.
    """
    config = getattr(model, "config", None)
    spec = find_spec(getattr(config, "model_type", None))
    owner_path, _, name = spec.layers.rpartition(".")
    try:
        text_model = model.get_submodule(owner_path)
        found: tuple[nn.Module, ...] = tuple(getattr(text_model, name))
    except AttributeError as error:
        raise UnsupportedModelError(
            f"expected the decoder layers of a {spec.model_type} at '{spec.layers}'; "
            f"{type(model).__name__} has none there. Pass the model that has generate "
            "(…ForConditionalGeneration, …ForCausalLM), with a decoder-only text model: see "
            f"{SUPPORT_PAGE}"
        ) from error
    text_config: Any = text_model.config
    inner = model.get_submodule(spec.layers.partition(".")[0])
    hooked = (model, inner) if inner is not text_model else (model, text_model)
    layers = tuple(layer for layer in found if not _without_attention(layer, spec))
    unrouted = tuple(layer for layer in found if _without_attention(layer, spec))
    slots = _check_layers(layers, text_config)
    check_takes_cache(text_model, *layers)
    sources = _sources(layers, text_config)
    return Anatomy(spec, layers, text_model, text_config, hooked, slots, unrouted, sources)


def _without_attention(layer: nn.Module, spec: ModelSpec) -> bool:
    """Whether a layer is of a kind that is known to have no self-attention to route."""
    marks = spec.unrouted
    if getattr(layer, "self_attn", None) is not None:
        marks = tuple(path for path in marks if path.startswith("self_attn."))
    return any(_has(layer, path) for path in marks)


def _has(layer: nn.Module, path: str) -> bool:
    """Whether `layer` has a module at a dotted path."""
    return any(name == path for name, _ in layer.named_modules())


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention of a decoder layer."""
    found: Any = next(filter(None, (getattr(layer, name, None) for name in _ATTENTION)), None)
    return found


def numbers_queries(attention: nn.Module) -> int | None:
    """Tokens from which an attention scales its queries by a place it counts itself, if ever.

    Temperature tuning of llama4 layers without RoPE (transformers 5.24, modeling_llama4.py): the
    place is that among the queries it is given, so none may be missing.
    """
    part: Any = attention
    counts = getattr(part, "attn_temperature_tuning", False) and not part.use_rope
    return int(part.floor_scale) if counts else None


def _check_layers(layers: tuple[nn.Module, ...], text_config: Any) -> tuple[int, ...]:
    """The cache index of each layer.

    Raises:
        UnsupportedModelError: A layer's attention cannot be routed.
    """
    slots = []
    for layer in layers:
        slot = getattr(attention_of(layer), "layer_idx", None)
        if slot is None:
            raise UnsupportedModelError(
                f"expected decoder layers with self-attention that know their index; "
                f"{type(layer).__name__} is none: see {SUPPORT_PAGE}"
            )
        slots.append(slot)
    types = getattr(text_config, "layer_types", None) or ()
    kinds = {types[slot] for slot in slots if slot < len(types)}
    unknown = sorted(kinds - ROUTABLE_LAYER_TYPES)
    if unknown or not slots:
        raise UnsupportedModelError(
            f"expected layer types {sorted(ROUTABLE_LAYER_TYPES)}; the text model "
            f"{text_config.model_type!r} has {unknown or 'none of them'}: see {SUPPORT_PAGE}"
        )
    return tuple(slots)


def sees_all(attention: Any, text_config: Any) -> bool:
    """Whether tokens of this attention see every token before them: no window, no chunks."""
    types = getattr(text_config, "layer_types", None)
    index = getattr(attention, "layer_idx", None)
    if types and index is not None:
        return types[index] == "full_attention"
    limits = ("sliding_window", "attention_chunk_size")
    return all(getattr(text_config, name, None) is None for name in limits)


def _sources(layers: tuple[nn.Module, ...], text_config: Any) -> tuple[int, ...]:
    """The layer whose keys each layer reads: the last earlier one of its type that owns any.

    Raises:
        UnsupportedModelError: Layers share keys in a way that is not known.
    """
    owners: dict[Any, int] = {}
    sources = []
    for index, layer in enumerate(layers):
        attention: Any = attention_of(layer)
        kind = getattr(attention, "layer_type", None)
        if not getattr(attention, "is_kv_shared_layer", False):
            owners[kind] = index
        sources.append(owners.get(kind, -1))
    shared = len(layers) - len(set(sources))
    ordered = sources[: len(layers) - shared] == list(range(len(layers) - shared))
    if shared != getattr(text_config, "num_kv_shared_layers", shared) or not ordered:
        raise UnsupportedModelError(
            "expected layers that share keys to stand behind all that own theirs, and to say so "
            f"(is_kv_shared_layer); those of {text_config.model_type!r} do not: see {SUPPORT_PAGE}"
        )
    return tuple(sources)


def describe(config: Any) -> str:
    """One sentence: where the decoder layers of a model with this config are.

    Raises:
        UnsupportedModelError: The model cannot be routed; the text says why.
    """
    spec = find_spec(getattr(config, "model_type", None))
    text_config = config.get_text_config()
    return (
        f"{spec.model_type}: supported; {text_config.num_hidden_layers} decoder layers at "
        f"{spec.layers} ({spec.note or spec.pruned})"
    )
