"""DareConfig: what a user asks of routing, checked when it is said."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

from peft.config import PeftConfig

from dare_hf.config.checks import (
    Unnamed,
    plain,
    refuses_unknown,
    shown,
    unnamed,
)
from dare_hf.config.fields import (
    CHECKS,
    PEFT_TYPE,
    BatchBudget,
    Decode,
    HopBudget,
    HopScore,
    LossReduction,
    Pruned,
    Ratio,
    Schedule,
    ScoreScaling,
    Selector,
    peft_type_of,
)
from dare_hf.config.json_file import read_object
from dare_hf.config.model_card import write_card
from dare_hf.config.scorer_names import FromFile
from dare_hf.errors import DareConfigError, alike
from dare_hf.policies import POLICIES

# What these fields are where nobody names them: under the schedule "safe", and under any other.
_SAFE: dict[str, Any] = {
    # the mean over the layers of thirds of 1, 1/2 and 1/4
    "vision_retention": 7 / 12,
    "text_retention": 1.0,
    "plan_every": 4,
    "uniform_share": 0.25,
    "recent_share": 0.75,
}
_OTHERWISE: dict[str, Any] = {
    "vision_retention": 0.4,
    "text_retention": 0.7,
    "plan_every": 1,
    "uniform_share": 0.0,
    "recent_share": 0.0,
}
# What a file that does not name these fields was made with, before there were any.
_BEFORE: dict[str, Any] = {"recent_tokens": 0, "recent_share": 0.0, "first_layers_whole": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "safe": {"schedule": "safe", "scorer": "attention", "hop_decay": 1.0, **_SAFE},
    # the method as the paper writes it, where this library does otherwise by default
    "literal": {
        "scorer": "router",
        "schedule": "learned",
        "vision_retention": 0.4,
        "text_retention": 0.7,
        "hop_aware": True,
        "prefix_tokens": 2,
        "pruned": "bypass",
        "first_layers_whole": 0,
        "recent_tokens": 0,
        "recent_share": 0.0,
        "normalize_input": False,
        "selector": "gumbel",
        "score_scaling": "multiply_training",
        "ratio": "per_rate",
        "loss_reduction": "sum",
    },
    **{policy.name: policy.fields for policy in POLICIES},
}


@refuses_unknown
@dataclass
class DareConfig(PeftConfig):
    """Settings of DARE routing, as a PEFT configuration (``adapter_config.json``).

    Retention is the share that is KEPT: 1 minus the compression ratio other tools speak of. The
    fields of `peft.PeftConfig` (task_type, base_model_name_or_path, inference_mode, ...) work as
    they do there.

    Six fields have a default that depends on others: left unnamed they are resolved when the
    object is made, and anew when `dataclasses.replace` names another schedule or scorer. What is
    read from a file is literal; one that does not name `recent_tokens`, `recent_share` and
    `first_layers_whole` is older than they are, and has 0 of each.

    Attributes:
        vision_retention: target share of vision tokens a layer works on, mean over layers, in
            (0, 1]; by default 7/12 under "safe", else 0.4. A list and a trained table do not read
            it; a fresh table starts from it and is trained towards it.
        text_retention: the same for text tokens; by default 1.0 under "safe", else 0.7.
        schedule: how the target spreads over layers: "safe" (vision 1 : 1/2 : 1/4 by thirds of the
            depth; text as "ramp"), "two_stage" (one rate up to cut_layer, a quarter of it behind,
            for vision; even for text), "ramp" (linear in depth, falling), "constant" (the target
            everywhere), "stages" (what `stages` says), "learned" (an adapter's table), or one
            (vision, text) pair in (0, 1] for each layer. By default "safe", and "two_stage" where
            the scorer is "router".
        plan_every: layers that share one selection, >= 1; by default 4 under "safe", else 1.
        batch_budget: "row" gives each row of a batch its own token count; "equal" gives every row
            the batch's largest (no masks, but a row's result then depends on its batch).
        uniform_share: share of each image's budget that an even grid over it takes first, [0, 1];
            by default 0.25 under "safe", else 0.
        recent_tokens: last text tokens of a span (a prompt, an injected text) that are kept
            whatever their score, >= 0, as special tokens and image delimiters are; not from a
            scorer of your own. With 0 a router keeps none of the three.
        recent_share: share of each layer's text budget that the newest text takes before any score
            decides, [0, 1]; by default 0.75 under "safe", else 0.
        cut_layer: last layer of two_stage's first stage: "auto" (half the depth), a layer index
            >= 0 or a fraction of the depth in (0, 1).
        stages: of the schedule "stages", pairs (start, weight): from the layer `start` on, an index
            >= 0 or a fraction of the depth in (0, 1) rounded up, a layer's vision rate is in
            proportion to `weight` > 0. Layers before the first stage keep everything.
        first_layers_whole: first decoder layers that keep everything, 0 to 1024; the others hold
            the mean. "auto": 2 in models of 8 layers or more, but 0 under "constant", "stages" and
            a list.
        prefix_tokens: first tokens of every hop that are always kept, >= 0.
        pruned: what happens to a token that is not kept: "bypass" skips this layer and competes
            again in the next, "drop" is out for all deeper layers, "freeze" skips it too but its
            key and value are stored and seen.
        mean_update: whether a token that is not kept adds the layer's mean update of its modality,
            a vector that an adapter brings: fitted by `fit_router`, a running mean in training.
            "auto" (on where an adapter brings it) is True in a configuration that `fit_router`
            makes an adapter from, else False.
        recycle: the best third of the vision tokens that a selection drops are clustered, and the
            clusters' means take part of the budget, in dropped tokens' places; needs
            ``pruned="drop"`` and ``scorer="text_raters"``.
        scorer: "attention", "router" (needs a trained adapter), "random", "key_norm", "position",
            "recent", those of baselines ("last_query", "own_attention", "text_raters", "diverse")
            or a name given to register_scorer before. A file may give one that is registered later;
            it is refused when the configuration is applied.
        hop_delimiters: what ends a hop of generated tokens: token ids >= 0, sequences of them, or
            strings (where a processor is given).
        hop_aware: rates per hop (True) or one row of rates for all hops.
        max_hops: hops with rates of their own, 1 to 1024; later hops use the last one's.
        hop_decay: factor on the vision rates for each hop after hop 1, in (0, 1].
        hop_summary: a closed hop after the prompt keeps its best so many tokens, text first, >= 1,
            whatever the rates; needs ``hop_budget="per_hop"``. None: rates say it.
        hop_score: score by which closed hops are thinned: "stored" (when the token was processed)
            or "observed" (by the hop's last queries). None: "observed" for the attention scorer.
        hop_budget: "pooled" lets tokens of all closed hops compete, "per_hop" those of one
            hop. None: "per_hop" for the attention scorer.
        max_kv_tokens: most tokens a layer holds per row after the prefill and after each hop,
            forced ones included, >= 1; between them the open hop's come on top. None: no cap.
        decode: "full" runs sampled tokens through all layers; "routed" skips layers by score.
        decode_window: sampled tokens after which a hop is closed even without a delimiter, >= 1.
            None: never.
        always_keep_token_ids: token ids (>= 0) that are never pruned.
        image_token_ids: token ids (>= 0) that are vision. None: found in the model's config.
        normalize_input: router input is RMS-normal (without parameters) first.
        score_scaling: "straight_through" leaves values as they are and passes the gradient;
            "multiply" multiplies a layer's update by the score, in training and inference;
            "multiply_training" in training alone.
        selector: relaxation of the selection in training: "soft_topk" or the paper's "gumbel".
        tau_start: temperature of training at its start, > 0.
        tau_end: temperature of training at its end, > 0.
        soft_temperature: T of soft_topk's sigmoid, > 0.
        ratio: what the vision loss brings to the target: the "mean" of the rates, or each of them
            ("per_rate", the paper's).
        loss_reduction: whether the losses are means over hops and layers ("mean") or sums.
        lambda_ratio: weight of the text ratio loss, >= 0.
        lambda_soft: weight of the vision rate loss, >= 0.
        lambda_hard: weight of the loss on vision scores behind the cut, >= 0.
        mu: factor of the hinge in the vision loss behind the cut, >= 0.
        epsilon: score above which that hinge acts, >= 0.
        seed: seed of the random scorer, an integer of 64 bits.
        num_layers: decoder layers of the model an adapter was made for, >= 1. None: a fresh
            configuration; written when the adapter is made, checked when it is loaded.
        hidden_size: hidden size of that model, >= 1 or None, likewise.
        model_type: `config.model_type` of that model or None, likewise.
        peft_type: "DARE_ROUTER".

    Raises:
        DareConfigError: a value of the wrong type or out of its range, also NaN; or a keyword
            that is no field.

    Examples:
        >>> from dare_hf import DareConfig
        >>> config = DareConfig(vision_retention=0.4)
        >>> config.vision_retention, config.text_retention, config.schedule
        (0.4, 1.0, 'safe')
        >>> DareConfig(vision_retention=40)
        Traceback (most recent call last):
            ...
        dare_hf.errors.DareConfigError: vision_retention must be a number in (0, 1], got 40.
    """

    vision_retention: float = unnamed(_SAFE["vision_retention"])
    text_retention: float = unnamed(_SAFE["text_retention"])
    schedule: Schedule | tuple[tuple[float, float], ...] = unnamed("safe")  # noqa: RUF009 - immutable
    plan_every: int = unnamed(_SAFE["plan_every"])
    batch_budget: BatchBudget = "row"
    uniform_share: float = unnamed(_SAFE["uniform_share"])
    recent_tokens: int = 32
    recent_share: float = unnamed(_SAFE["recent_share"])
    cut_layer: int | float | Literal["auto"] = "auto"
    stages: tuple[tuple[int | float, float], ...] = ()
    first_layers_whole: int | Literal["auto"] = "auto"
    prefix_tokens: int = 2
    pruned: Pruned = "bypass"
    mean_update: bool | Literal["auto"] = "auto"
    recycle: bool = False
    scorer: str = "attention"
    hop_delimiters: tuple[int | tuple[int, ...] | str, ...] = ()
    hop_aware: bool = True
    max_hops: int = 8
    hop_decay: float = 1.0
    hop_summary: int | None = None
    hop_score: HopScore | None = None
    hop_budget: HopBudget | None = None
    max_kv_tokens: int | None = None
    decode: Decode = "full"
    decode_window: int | None = None
    always_keep_token_ids: tuple[int, ...] = ()
    image_token_ids: tuple[int, ...] | None = None
    normalize_input: bool = True
    score_scaling: ScoreScaling = "straight_through"
    selector: Selector = "soft_topk"
    tau_start: float = 1.0
    tau_end: float = 0.2
    soft_temperature: float = 0.05
    ratio: Ratio = "mean"
    loss_reduction: LossReduction = "mean"
    lambda_ratio: float = 1.0
    lambda_soft: float = 1.0
    lambda_hard: float = 1.0
    mu: float = 0.1
    epsilon: float = 0.3
    seed: int = 0
    num_layers: int | None = None
    hidden_size: int | None = None
    model_type: str | None = None
    peft_type: str | None = PEFT_TYPE

    def __post_init__(self) -> None:
        """Check every field and bring it into its one form (floats, tuples)."""
        self._check()
        super().__post_init__()
        if isinstance(self.schedule, Unnamed):
            self.schedule = unnamed("two_stage" if self.scorer == "router" else "safe")
        for name, value in (_SAFE if self.schedule == "safe" else _OTHERWISE).items():
            if isinstance(getattr(self, name), Unnamed):
                setattr(self, name, unnamed(value))

    def _check(self) -> None:
        for name, check in CHECKS.items():
            given = getattr(self, name)
            checked = check(name, given)
            if not isinstance(given, Unnamed):
                setattr(self, name, checked)

    def checked(self, **facts: Any) -> "DareConfig":
        """A copy that is checked again, since fields can be set after the object was made.

        Args:
            facts: fields of the copy that are other than here.

        Raises:
            DareConfigError: a value of the wrong type or out of its range.
        """
        twin = copy.deepcopy(self)
        vars(twin).update(facts)
        twin._check()
        return twin

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; made from them, a configuration is literal."""
        return {name: plain(value) for name, value in super().to_dict().items()}

    @property
    def resolved_hop_score(self) -> HopScore:
        """`hop_score`, or what None means for this scorer."""
        return self.hop_score or ("observed" if self.scorer == "attention" else "stored")

    @property
    def resolved_hop_budget(self) -> HopBudget:
        """`hop_budget`, or what None means for this scorer."""
        return self.hop_budget or ("per_hop" if self.scorer == "attention" else "pooled")

    @property
    def learns_rates(self) -> bool:
        """Whether the rates are an adapter's parameters."""
        return self.schedule == "learned"

    @property
    def drops(self) -> bool:
        """Whether deeper layers go without what a layer leaves out."""
        return self.pruned == "drop"

    @property
    def freezes(self) -> bool:
        """Whether a layer stores keys of tokens that do not run it."""
        return self.pruned == "freeze"

    @property
    def multiplies(self) -> bool:
        """Whether a token's update is multiplied by its score, so that each layer needs scores."""
        return self.score_scaling == "multiply"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and beside an adapter's tensors the model card.

        Args:
            save_directory: the folder.
            kwargs: as `peft.PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.num_layers is None:
            return
        named = isinstance(self.schedule, str)
        facts = {
            "made for": f"{self.model_type}, {self.num_layers} layers of width {self.hidden_size}",
            "retention targets": f"vision {self.vision_retention}, text {self.text_retention}",
            "scorer": self.scorer,
            "schedule": self.schedule if named else "one (vision, text) pair for each layer",
            "rates by hop": f"yes, {self.max_hops}" if self.hop_aware else "no",
            "hop delimiters": list(self.hop_delimiters),
        }
        write_card(save_directory, self.base_model_name_or_path, self.model_type, facts)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "DareConfig":
        """A named configuration, with some fields set otherwise.

        Args:
            name: "safe" (training-free, what ``apply_dare(model)`` uses), "literal" (trained as
                the paper writes it, for comparison; docs/method.md, section 7) or a baseline of
                `dare_hf.policies`.
            overrides: fields of DareConfig that replace the preset's.

        Raises:
            DareConfigError: no such preset, or a value out of range.

        Examples:
            >>> from dare_hf import DareConfig
            >>> DareConfig.preset("fastv", vision_retention=0.6).vision_retention
            0.6
        """
        if name not in PRESETS:
            known = ", ".join(repr(preset) for preset in sorted(PRESETS))
            near = alike(name, PRESETS) if isinstance(name, str) else ""
            raise DareConfigError(f"preset must be one of {known}, got {name!r}{near}.")
        return cls(**(PRESETS[name] | overrides))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields an ``adapter_config.json`` holds.

        Raises:
            DareConfigError: the file is no JSON object, or larger than a configuration is.
        """
        fields = read_object(path_json_file)
        fields.pop("runtime_config", None)  # as peft, which warns
        return fields

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "DareConfig":
        """Build from the fields of an ``adapter_config.json``, without PEFT's table of methods.

        Raises:
            DareConfigError: the file belongs to another PEFT method, or has fields unknown here.
        """
        peft_type_of("peft_type", kwargs.get("peft_type", PEFT_TYPE.value))
        unknown = sorted(set(kwargs) - set(cls.__dataclass_fields__))
        if unknown:
            raise DareConfigError(
                "adapter_config.json has fields this version does not know: "
                f"{shown(', '.join(unknown))}. "
                "It was written by a newer dare_hf or peft: upgrade, or remove them from the file."
            )
        if isinstance(kwargs.get("scorer"), str):
            kwargs["scorer"] = FromFile(kwargs["scorer"])
        return cls(**(_BEFORE | kwargs))
