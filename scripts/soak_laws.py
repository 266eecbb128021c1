"""The laws of docs/method.md, section 8, as checks of one case of `make soak`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from soak_cases import SCORER, batch, config_of, content_scores
from soak_run import Forced, inject, own_tokens, state_of
from torch.nn.functional import pad
from transformers import DynamicCache

from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance.laws import LawBroken, hold, hold_close, snapshot
from dare_hf.engine.settings import resolve
from dare_hf.errors import DareError
from dare_hf.generation import HopLoop
from dare_hf.testing.hop_oracle import HopRules, hop_forward, token_hops
from dare_hf.testing.oracle import OracleRouting, masked_forward

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak_run import Run
    from torch import Tensor

    from dare_hf.config import DareConfig
    from dare_hf.testing.samples import Batch

SLACK, SPARE_TOKENS = 1.25, 64
"""What a cache may hold over its largest row, and tokens a layer on top."""


def checks(run: Run) -> list[tuple[str, Callable[[Run], None]]]:
    """The laws that speak of a case. Those of a model with DARE on it come first."""
    case, fields = run.case, run.case.fields
    if case.mode == "refused":
        return [("refusal", refusal), ("remove", removed)]
    stepwise = case.mode in ("greedy", "sample", "inject")
    exact = case.dtype != "bfloat16"  # whose rounding alone moves the scores
    plain = stepwise and case.mode != "inject" and case.turns == 1
    stored = run.config.scorer == SCORER and run.config.resolved_hop_score == "stored"
    ruled = stored and fields["uniform_share"] == 0 and case.chunk is None
    # A sliding window counts columns, the pads between injected tokens included.
    slides = case.mode == "inject" and slides_somewhere(run)
    laws: dict[str, tuple[Callable[[Run], None], bool]] = {
        "bytes": (measured, True),
        "cap": (capped, fields["max_kv_tokens"] is not None and plain),
        "seen": (seen, stepwise and exact),
        "oracle": (oracle, plain and ruled and exact),
        "alone": (alone, exact and fields["batch_budget"] == "row" and not slides),
        "speculation": (speculation, exact and case.mode == "lookup"),
        "beams": (beams, exact and case.mode == "beam" and not case.ends),
        "parity": (parity, exact and plain and case.chunk is None),
        "identity": (identity, exact and case.mode != "inject"),
        "again": (again, True),
        "remove": (removed, True),
    }
    return [(name, check) for name, (check, speaks) in laws.items() if speaks]


def slides_somewhere(run: Run) -> bool:
    """Whether some layer attends within a window only."""
    config = run.subject.model.config.get_text_config()
    return bool(getattr(config, "sliding_window", None))


def measured(run: Run) -> None:
    """Law 6: bytes measured are bytes predicted, and follow from the tensors."""
    cache, report = cache_of(run.out), run.report
    kept, ones = cache.kept_lengths(), [layer.token_bytes() for layer in cache.stored]
    total = sum(int(n.sum()) * one for n, one in zip(kept, ones, strict=True))
    by_hand = sum(
        int((layer.positions() >= 0).sum()) * _bytes_of_one(layer) for layer in cache.stored
    )
    found = [cache.kv_bytes(), report.kv_bytes, report.kv_bytes_predicted, by_hand]
    hold(found == [total] * 4, f"cache, report, predicted, by hand {found}, kept {total}")
    limit = sum(
        (SLACK * int(n.max()) * len(n) + SPARE_TOKENS) * one
        for n, one in zip(kept, ones, strict=True)
    )
    hold(cache.allocated_bytes() <= limit, f"allocated {cache.allocated_bytes()} of {limit}")
    real = int((cache.log.modality >= 0).sum())
    whole = real * sum(_bytes_of_one(layer) for layer in cache.stored)
    hold(report.kv_bytes_baseline == whole, f"baseline {report.kv_bytes_baseline}, real {whole}")


def _bytes_of_one(layer: Any) -> int:
    """Bytes of one token's key and value, by the shapes of what attention gets."""
    if layer.keys is None:
        return 0
    parts = (layer.keys, layer.values)
    return sum(p.shape[1] * p.shape[3] * p.element_size() for p in parts)


def token_hop(run: Run) -> Tensor:
    """Long[B, N]: the hop of each token the cache has seen, counted by the oracle's loop."""
    ends = [e if isinstance(e, tuple) else (e,) for e in run.config.hop_delimiters]
    ids = run.out.sequences[:, :-1]
    real = pad(run.batch.real, (0, ids.shape[1] - run.span), value=True)
    return token_hops(ids, real, run.span, ends, run.config.decode_window)


def capped(run: Run) -> None:
    """After the prompt no row of a layer holds more of closed hops than the cap."""
    hop, cap = token_hop(run), run.config.max_kv_tokens
    hops = cache_of(run.out).hops.tolist()
    for step in run.seen:
        now = hop[:, step.end - 1 : step.end]
        closed = (hop >= 0) & (hop < now)
        for layer in range(len(run.sources)):
            most = int((step.held(layer, hop.shape[1], left=True) & closed).sum(dim=1).max())
            hold(most <= cap, f"layer {layer} holds {most} of closed hops at {step.end}")
    hold(hops == hop[:, -1].tolist() or _just_closed(run, hop, hops), f"hops {hops}")


def _just_closed(run: Run, hop: Tensor, hops: list[int]) -> bool:
    """The counters run ahead by one where the last token closed a hop."""
    pairs = zip(hop[:, -1].tolist(), hops, strict=True)
    return all(theirs in (own, own + 1) for own, theirs in pairs)


def hold_places(run: Run, logits: Tensor) -> None:
    """Hold each sampled step to a full-length forward's logits [B, N, V]."""
    for row, columns in enumerate(run.places()):
        hold(len(columns) == len(run.out.logits), f"row {row}: {len(columns)} steps were expected")
        for step, column in enumerate(columns):
            pair = run.out.logits[step][row], logits[row, column].to(run.out.logits[step].dtype)
            hold_close(run.subject, *pair, f"row {row}, step {step}")


def seen(run: Run) -> None:
    """Law 2, whatever was kept: each query saw what the cache held in its forward, by masks."""
    real = run.real
    keep, visible = [], []
    for layer in range(len(run.sources)):
        views = [step.held(layer, real.shape[1]) & real for step in run.seen]
        spans = [slice(step.start, step.end) for step in run.seen]
        pairs = list(zip(views, spans, strict=True))
        keep.append(torch.cat([view[:, span] for view, span in pairs], dim=1))
        shown = [view[:, None].expand(-1, span.stop - span.start, -1) for view, span in pairs]
        visible.append(torch.cat(shown, dim=1))
    hold_places(run, masked_forward(run.subject.model, run.written(), keep, visible))


def rules(run: Run) -> tuple[OracleRouting, HopRules]:
    """The configuration in the oracle's words."""
    config, model = run.config, run.subject.model
    settings = resolve(model, config, locate(model))
    table = settings.table
    pairs = [list(zip(*rows, strict=True)) for rows in zip(table.vision, table.text, strict=True)]
    routing = OracleRouting(
        rates=pairs[0],
        plan_layers=table.plan_layers,
        sources=run.sources,
        prefix_tokens=config.prefix_tokens,
        always_keep=config.always_keep_token_ids,
        pruned=config.pruned,
        batch_budget=config.batch_budget,
        recent_share=config.recent_share,
    )
    hops = HopRules(
        rates=pairs,
        delimiters=[e if isinstance(e, tuple) else (e,) for e in config.hop_delimiters],
        window=config.decode_window,
        pooled=config.resolved_hop_budget == "pooled",
        cap=config.max_kv_tokens,
    )
    return routing, hops


def oracle(run: Run) -> None:
    """Law 2: the slow loops of the oracle choose, and never ask the fast code."""
    inputs, modality = run.subject.written(run.batch, run.out.sequences[:, :-1])
    inputs = {**inputs, "input_ids": run.out.sequences[:, :-1]}
    routing, hops = rules(run)
    expected = hop_forward(
        run.subject.model,
        inputs,
        content_scores,
        routing,
        hops,
        span=run.span,
        modality=modality,
    )
    hold_places(run, expected.logits)
    for layer, (source, theirs) in enumerate(zip(run.sources, expected.held, strict=True)):
        ours = run.seen[-1].held(source, theirs.shape[1]) & run.real
        hold(torch.equal(ours, theirs), f"layer {layer} keeps other tokens")


def alone(run: Run) -> None:
    """Law 3: one of the rows alone is what it is in the batch."""
    row = run.case.seed % len(run.rows)
    # Chunks are cut by columns, padding included: there the padding stays, and rows go.
    given = batch(run.case, [run.rows[row]], width=run.span if run.case.chunk else None)
    if run.case.mode == "beam":
        return _alone_beams(run, row, given)
    written = run.out.sequences[row, run.span :]
    kwargs: dict[str, Any] = {"eos_token_id": None}
    if run.case.turns == 1:
        kwargs["max_new_tokens"] = len(run.out.logits)
    if run.case.mode in ("greedy", "sample"):
        kwargs["logits_processor"] = [Forced(written[None], given.modality.shape[1])]
    with run.subject.dare(run.config):
        own = run.generate(given, **kwargs)
    if run.case.mode == "inject":
        written = written[pad(run.real, (0, 1), value=True)[row, run.span :]]
    hold(own.sequences[0, given.modality.shape[1] :].tolist() == written.tolist(), "other tokens")
    for step, (left, right) in enumerate(zip(own.logits, run.out.logits, strict=True)):
        hold_close(run.subject, left[0], right[row], f"row {row}, step {step}")
    if run.case.mode == "inject":
        return  # another row's answer is a forward more, in which this row's last hop may end
    ours, theirs = cache_of(own), cache_of(run.out)
    hold(int(ours.hops[0]) == int(theirs.hops[row]), f"row {row} is in another hop")
    pairs = zip(own_tokens(ours, 0), own_tokens(theirs, row), strict=True)
    for layer, (left, right) in enumerate(pairs):
        hold(left == right, f"row {row}, layer {layer} keeps other tokens")


def _alone_beams(run: Run, row: int, given: Batch) -> None:
    with run.subject.dare(run.config):
        own = run.generate(given)
    ours = own.sequences[0, given.modality.shape[1] :].tolist()
    theirs = run.out.sequences[row, run.span :].tolist()
    both = min(len(ours), len(theirs))
    fills = {0, *run.case.ends[:1]}  # transformers fills with the first end where no pad is set
    same = ours[:both] == theirs[:both] and fills.issuperset(ours[both:] + theirs[both:])
    hold(same, f"row {row}: beams {ours} alone, {theirs} in the batch")
    gap = float((own.sequences_scores[0] - run.out.sequences_scores[row]).abs())
    hold(gap <= 1e-3, f"row {row}: beam scores differ by {gap:.1e}")


def speculation(run: Run) -> None:
    """Law 1 of a pruned model: prompt lookup writes and keeps what greedy does."""
    model = run.subject.model
    with run.subject.dare(run.config):
        greedy = run.generate(run.batch, prompt_lookup_num_tokens=None)
        ours, theirs = run.out.sequences.tolist(), greedy.sequences.tolist()
        hold(ours == theirs, f"lookup {ours[0][run.span :]}, greedy {theirs[0][run.span :]}")
        again = run.generate(run.batch)
        states = []
        for out in (again, greedy):
            cache = cache_of(out)
            if cache.get_seq_length() != out.sequences.shape[1] - 1:
                return  # an end among accepted candidates: the cache is ahead
            with torch.no_grad():
                model(input_ids=out.sequences[:, -1:], **{CACHE: cache}, use_cache=True)
            states.append((cache.hops.tolist(), own_tokens(cache, 0)))
    hold(states[0][0] == states[1][0], f"hops {states[0][0]}, of greedy {states[1][0]}")
    hold(states[0][1] == states[1][1], "keeps other tokens than greedy")


def beams(run: Run) -> None:
    """A beam's score is what its tokens score when each sequence is written without beams."""
    many = {"num_return_sequences": run.options()["num_beams"]}
    with run.subject.dare(run.config):
        out = run.generate(run.batch, **many)
        forced = Forced(out.sequences[:, run.span :], run.span)
        own = run.generate(
            run.batch, num_beams=1, do_sample=True, logits_processor=[forced], **many
        )
    steps = torch.stack(own.logits, dim=1).double().log_softmax(-1)
    new = own.sequences[:, run.span :, None]
    scores = steps.gather(-1, new)[..., 0].mean(dim=1)
    gap = float((scores - out.sequences_scores).abs().max())
    hold(gap <= 1e-3, f"beam scores differ by {gap:.1e} from those of the tokens")


def parity(run: Run) -> None:
    """Law 4: the teacher-forced forward is generate step by step."""
    inputs, _ = run.subject.written(run.batch, run.out.sequences)
    labels = run.out.sequences.clone()
    labels[:, : run.span] = -100
    with run.subject.dare(run.config), torch.no_grad():
        hold_places(run, run.subject.model(**inputs, labels=labels).logits)


def identity(run: Run) -> None:
    """Law 1: at retention 1.0 the model is the one it was."""
    everything = {
        "vision_retention": 1.0,
        "text_retention": 1.0,
        "schedule": "constant",
        "hop_decay": 1.0,
        "max_kv_tokens": None,
    }
    config = config_of(run.case, **everything)
    kwargs = {}
    if run.case.turns == 2:
        kwargs[CACHE] = DynamicCache(config=run.subject.model.config.get_text_config())
    plain = run.generate(run.batch, **kwargs)
    with run.subject.dare(config):
        whole = run.generate(run.batch)
    ours, theirs = whole.sequences.tolist(), plain.sequences.tolist()
    hold(ours == theirs, "other tokens than the plain model")
    if run.case.mode == "lookup":
        return  # the steps depend on which candidates were looked up
    for step, (left, right) in enumerate(zip(whole.logits, plain.logits, strict=True)):
        hold_close(run.subject, left, right, f"step {step}")


def again(run: Run) -> None:
    """Law 8: after all that ran since, the same call gives the same bits."""
    with run.subject.dare(run.config):
        out = run.generate(run.batch)
    hold(out.sequences.tolist() == run.out.sequences.tolist(), "other tokens")
    same = all(torch.equal(a, b) for a, b in zip(out.logits, run.out.logits, strict=True))
    hold(same, "other logits")
    state = state_of(cache_of(out))
    for name in state:
        hold(state[name] == run.state[name], f"other {name}")


def removed(run: Run) -> None:
    """Law 7: nothing is left on the model, and it computes the same bits."""
    after = snapshot(run.subject.model)
    names = [k for k in {*after, *run.before} if after.get(k) != run.before.get(k)]
    hold(not names, f"left behind or changed: {names[:3]}")
    now, before = (x[run.batch.real] for x in (run.subject.forward(run.batch), run.logits))
    hold(torch.equal(now, before), "other logits after remove_dare")


def refusal(run: Run) -> None:
    """What cannot be right is refused, and the model still generates as before."""
    layers = len(run.sources)
    at_apply: list[dict[str, Any]] = [
        {"scorer": "router", "schedule": "constant"},
        {"schedule": "learned"},
        {"decode": "routed"},
        {"schedule": ((0.5, 0.5),) * (layers + 1)},
        {"always_keep_token_ids": (10**6,)},
    ]
    at_call: list[dict[str, Any]] = [
        {CACHE: DynamicCache()},
        {"cache_implementation": "static"},
        {"hop_loop": HopLoop(inject), "use_cache": False},
        {"hop_loop": inject},
        {"modality_mask": torch.zeros(1, 1)},
    ]
    ways = [*at_apply, *at_call]
    way = ways[run.case.seed % len(ways)]
    if way in at_apply:
        return _refused(lambda: _enter(run, config_of(run.case, **way)), way)
    with run.subject.dare(run.config):
        first = run.generate(run.batch)
        _refused(lambda: run.generate(run.batch, **way), way)
        hold(run.generate(run.batch).sequences.equal(first.sequences), f"other tokens after {way}")


def _enter(run: Run, config: DareConfig) -> None:
    with run.subject.dare(config):
        pass


def _refused(call: Callable[[], Any], way: dict[str, Any]) -> None:
    try:
        call()
    except DareError:
        return
    raise LawBroken(f"not refused: {list(way)}")
