"""Baselines: which tokens survive, layer by layer, against plain eager attention and loops."""

import math

import pytest
import torch
from laws import NEW_TOKENS, assert_close, dare, forward, generate, inputs_of, rows_of

from dare_hf import DareCache, DareConfig, HopTokens, apply_dare, last_report
from dare_hf.compat import CACHE, cache_of
from dare_hf.errors import DareConfigError, DareInputError, UnsupportedModelError
from dare_hf.expected import match_budget
from dare_hf.policies import POLICIES
from dare_hf.routing.clusters import density_peaks, recycled, room_for_clusters
from dare_hf.testing import (
    collate,
    decoder_layers,
    masked_forward,
    modality_of,
    tiny_model,
)
from dare_hf.testing.oracle import masked_layers
from dare_hf.testing.shrink import shrunk_model

LAYERS = 8
BATCHES = {"alone": (2,), "padded": (0, 1, 2)}
RATES = ("vision_retention", "text_retention")
CUTS = {  # budgets at which every stage cuts in a model of 8 layers
    "fastv": {"stages": ((2, 1.0),), "vision_retention": 0.55},
    "pyramiddrop": {"vision_retention": 0.5},
    "sparsevlm": {"recycle": False},
    "diverse": {},
}


def model_of(name="llava", attention="eager", seed=0):
    return tiny_model(name, attn_implementation=attention, layers=LAYERS, seed=seed)


def survivors(model, inputs, name, **fields):
    """Bool[B, S] of each layer: what the compact run has stored, and its logits."""
    cache = DareCache()
    with dare(model, DareConfig.preset(name, **fields)):
        logits = forward(model, inputs, **{CACHE: cache}, use_cache=True).logits
    real = inputs["attention_mask"].bool()
    keep = [torch.zeros_like(real) for _ in range(LAYERS)]
    for mask, layer in zip(keep, cache.layers, strict=True):
        for row, columns in zip(mask, layer.positions(), strict=True):
            row[columns[columns >= 0]] = True
        mask &= real
    return keep, logits


def rates_of(name, **fields):
    """Share of the images each layer keeps, by the words of the policy."""
    config = DareConfig.preset(name, **fields)
    if config.schedule == "constant":
        return [config.vision_retention] * LAYERS
    weights = [None] * LAYERS
    for start, weight in config.stages:
        first = start if isinstance(start, int) else math.ceil(start * LAYERS)
        weights[first:] = [weight] * (LAYERS - first)
    whole = weights.count(None)
    scale = (config.vision_retention * LAYERS - whole) / sum(w for w in weights if w)
    assert all(w is None or w * scale < 1 for w in weights), "a stage that cuts nothing"
    return [1.0 if w is None else w * scale for w in weights]


@torch.no_grad()
def attentions(model, inputs, keep):
    """[L] of [B, H, S, S]: the plain model's own eager attention with only `keep` seen."""
    found = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, args, out: found.append(out[1]))
        for layer in decoder_layers(model)
    ]
    try:
        with masked_layers(model, lambda layer, hidden: keep[layer]):
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def raters_of(embeddings, kinds):
    """Text behind the first vision token whose mean share of the images is above the mean."""
    vision = [c for c, kind in enumerate(kinds) if kind == 1]
    text = [c for c, kind in enumerate(kinds) if kind == 0 and vision and c > vision[0]]
    share = dict.fromkeys(text, 0.0)
    for v in vision:
        dots = {t: float(embeddings[v] @ embeddings[t]) for t in text}
        total = sum(math.exp(dot - max(dots.values())) for dot in dots.values())
        for t in text:
            share[t] += math.exp(dots[t] - max(dots.values())) / total / len(vision)
    mean = sum(share.values()) / max(len(text), 1)
    return [t for t in text if share[t] > mean] or text


def farthest_first(features):
    """The greedy order, one pair of points at a time."""
    n = len(features)

    def apart(i, j):
        a, b = features[i], features[j]
        return 1 - float(a @ b / (a.norm() * b.norm()))

    if not n:
        return []
    order = [max(range(n), key=lambda i: min((apart(i, j) for j in range(n) if j != i), default=0))]
    while len(order) < n:
        rest = [i for i in range(n) if i not in order]
        order.append(max(rest, key=lambda i: min(apart(i, j) for j in order)))
    return order


@torch.no_grad()
def embeddings_of(model, inputs):
    seen = []
    hook = decoder_layers(model)[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def reference(model, inputs, name, **fields):
    """Which tokens survive, from the policy's own words, one layer and token at a time."""
    modality, rates = modality_of(model, inputs), rates_of(name, **fields)
    keep = [modality >= 0 for _ in range(LAYERS)]
    embeddings = embeddings_of(model, inputs)
    for layer in range(LAYERS):
        if layer and rates[layer] == rates[layer - 1]:
            keep[layer] = keep[layer - 1].clone()
            continue
        if rates[layer] == 1:
            continue
        before = keep[layer - 1] if layer else modality >= 0
        trial = [*keep[:layer], *[before] * (LAYERS - layer)]
        maps = attentions(model, inputs, trial)
        for row in range(len(modality)):
            kinds = modality[row].tolist()
            images = [c for c, kind in enumerate(kinds) if kind == 1]
            left = [c for c in images if before[row, c]]
            last = max(c for c, kind in enumerate(kinds) if kind >= 0)
            if name == "diverse":
                order = farthest_first(embeddings[row, left])
                ranked = [left[i] for i in order]
            else:
                rows = raters_of(embeddings[row], kinds) if name == "sparsevlm" else [last]
                at = maps[layer if name == "pyramiddrop" else layer - 1][row]
                score = {c: float(at[:, rows, c].double().mean()) for c in left}
                ranked = sorted(left, key=lambda c: -score[c])
            count = math.ceil(rates[layer] * len(images) - 1e-4)
            chosen = set(ranked[:count])
            keep[layer][row] = torch.tensor(
                [kind == 0 or (kind == 1 and c in chosen) for c, kind in enumerate(kinds)]
            )
    return keep


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl", "chameleon"])
@pytest.mark.parametrize("name", CUTS)
def test_the_survivors_are_those_of_the_policys_own_words(name, model_name, rows):
    plain = model_of(model_name)
    inputs = inputs_of(plain, BATCHES[rows])
    expected = reference(plain, inputs, name, **CUTS[name])
    model = model_of(model_name)
    keep, logits = survivors(model, inputs, name, **CUTS[name])
    for layer, (got, want) in enumerate(zip(keep, expected, strict=True)):
        assert got.equal(want), f"{name}: layer {layer} keeps others"
    assert not all(mask.equal(keep[0]) for mask in keep[1:]) or name == "diverse"
    real = inputs["attention_mask"].bool()
    masked = masked_forward(plain, inputs, keep)
    assert_close(logits[real], masked[real], tolerance=5e-4, what=f"{name}, {model_name}")


def merged_by_hand(points, clusters):
    """Density peaks and the means of their clusters, by Python numbers."""
    n, width = len(points), len(points[0])
    far = [[math.dist(a, b) / math.sqrt(width) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in far]
    most = max(map(max, far))
    apart = [
        min((far[i][j] for j in range(n) if density[j] > density[i]), default=most)
        for i in range(n)
    ]
    by_peak = sorted(range(n), key=lambda i: -density[i] * apart[i])
    centres = sorted(by_peak[:clusters])
    members = {c: [] for c in centres}
    for i in range(n):
        members[i if i in centres else min(centres, key=lambda c: far[i][c])].append(i)
    return [
        [sum(points[i][d] for i in own) / len(own) for d in range(width)]
        for own in members.values()
    ]


def test_clusters_are_the_means_around_density_peaks():
    torch.manual_seed(0)
    for n, clusters in ((1, 1), (5, 1), (12, 2), (23, 3), (40, 5)):
        points = torch.randn(n, 6)
        expected = merged_by_hand(points.double().tolist(), clusters)
        assert torch.allclose(density_peaks(points, clusters), torch.tensor(expected), atol=1e-5)


def test_kept_and_clusters_fill_the_budget():
    for available in range(60):
        for budget in range(available + 1):
            clusters = room_for_clusters(budget, available)
            taken, wanted = recycled(available - (budget - clusters))
            assert clusters == min(wanted, budget), (available, budget)
            assert clusters <= taken or not taken
    assert recycled(276) == (83, 9)  # 30 % and one, of them a tenth and one


@torch.no_grad()
def recycled_reference(model, inputs, stages):
    """Survivors and logits of SparseVLM with recycling, one cut at a time on the plain model."""
    modality, rates = modality_of(model, inputs), stages
    keep = [modality >= 0 for _ in range(LAYERS)]
    embeddings, placed = embeddings_of(model, inputs)[0], {}
    kinds = modality[0].tolist()
    images = [c for c, kind in enumerate(kinds) if kind == 1]
    entering = {}

    def replace(layer, args):
        index = list(decoder_layers(model)).index(layer)
        hidden = args[0].clone()
        for column, vector in placed.get(index, {}).items():
            hidden[0, column] = vector
        entering[index] = args[0][0]
        return (hidden, *args[1:])

    hooks = [layer.register_forward_pre_hook(replace) for layer in decoder_layers(model)]
    try:
        for layer in range(1, LAYERS):
            if rates[layer] == rates[layer - 1]:
                keep[layer] = keep[layer - 1].clone()
                continue
            before = keep[layer - 1]
            maps = attentions(model, inputs, [*keep[:layer], *[before] * (LAYERS - layer)])
            raters = raters_of(embeddings, kinds)
            score = {c: float(maps[layer - 1][0][:, raters, c].mean()) for c in images}
            ranked = sorted((c for c in images if before[0, c]), key=lambda c: -score[c])
            budget = math.ceil(rates[layer] * len(images) - 1e-4)
            for kept in range(budget, -1, -1):
                dropped = ranked[kept:]
                taken = math.floor(0.3 * len(dropped)) + 1
                clusters = math.floor(taken / 10) + 1
                if kept + clusters == budget:
                    break
            points = sorted(dropped[:taken])
            vectors = merged_by_hand([entering[layer][c].tolist() for c in points], clusters)
            slots = sorted(dropped)[:clusters]
            placed[layer] = dict(zip(slots, map(torch.tensor, vectors), strict=True))
            stays = {*ranked[:kept], *slots}
            keep[layer] = torch.tensor([[k == 0 or c in stays for c, k in enumerate(kinds)]])
        with masked_layers(model, lambda layer, hidden: keep[layer]):
            return keep, model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl", "chameleon"])
def test_what_sparsevlm_recycles_is_the_references(model_name):
    plain = model_of(model_name)
    inputs = inputs_of(plain, (3,))
    expected, logits = recycled_reference(plain, inputs, rates_of("sparsevlm"))
    keep, got = survivors(model_of(model_name), inputs, "sparsevlm")
    without, _ = survivors(model_of(model_name), inputs, "sparsevlm", recycle=False)
    for layer, (one, two) in enumerate(zip(keep, expected, strict=True)):
        assert one.equal(two), f"layer {layer} keeps others"
        assert one.sum() == without[layer].sum(), "clusters are part of the budget"
    assert not keep[-1].equal(without[-1]), "nothing was recycled"
    assert_close(got, logits, tolerance=5e-4, what=model_name)


def test_a_row_recycles_as_it_does_alone():
    model = model_of()
    rows = rows_of(model, (1, 3))
    _, together = survivors(model_of(), collate(model, rows), "sparsevlm")
    for row, one in enumerate(rows):
        inputs = collate(model, [one])
        _, alone = survivors(model_of(), inputs, "sparsevlm")
        n = inputs["input_ids"].shape[1]
        assert_close(together[row, -n:], alone[0], tolerance=5e-4, what=f"row {row}")


def test_heima_leaves_a_closed_hop_its_last_token_and_the_prompt_whole():
    model = model_of(attention="sdpa")
    inputs = inputs_of(model, (2,))
    plain = generate(model, inputs, max_new_tokens=12)
    written = plain.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = written[3]
    prompt = inputs["input_ids"].shape[1]
    for summary in (1, 2):
        preset = DareConfig.preset("heima", hop_delimiters=(ends,), hop_summary=summary)
        with dare(model, preset):
            out = generate(model, inputs, max_new_tokens=12)
            report = last_report(model)
        hop, expected, begun = [], list(range(prompt)), 0
        tokens = out.sequences[0, prompt:-1].tolist()
        for place, token in enumerate(tokens):
            hop.append(prompt + place)
            if token == ends and place < len(tokens) - 1:
                expected, hop, begun = expected + hop[-summary:], [], begun + 1
        assert begun, "no hop has closed"
        for layer in cache_of(out).layers:
            assert layer.positions()[0].tolist() == expected + hop
        assert report.kv_bytes == report.kv_bytes_predicted


def test_random_and_symmetric_are_what_they_say():
    model = model_of(attention="sdpa")
    inputs = inputs_of(model, (3,))
    modality = modality_of(model, inputs)
    keep, _ = survivors(model, inputs, "random")
    for mask in keep:
        assert mask[modality == 0].all()
        assert int(mask[modality == 1].sum()) == math.ceil(0.4 * int((modality == 1).sum()))
    assert not keep[0].equal(keep[1])
    with (
        pytest.raises(DareConfigError, match="adapter"),
        dare(model, DareConfig.preset("symmetric")),
    ):
        pass
    both = DareConfig.preset("symmetric", scorer="key_norm", recent_tokens=0)
    with dare(model, both):
        cache = DareCache()
        forward(model, inputs, **{CACHE: cache}, use_cache=True)
        # no token is vision to it: one budget for all
        assert last_report(model).retention[0][3].keys() >= {"text"}


@pytest.mark.parametrize("of", ["flops", "kv"])
@pytest.mark.parametrize("target", [0.5, 0.7])
@pytest.mark.parametrize("name", [p.name for p in POLICIES if p.moves])
def test_budgets_are_met_and_what_was_met_is_what_runs(name, target, of):
    model = model_of(attention="sdpa")
    inputs = inputs_of(model, (60,))  # many tokens: one of them is little of a budget
    modality = modality_of(model, inputs)[0]
    prompt = HopTokens(
        vision=int((modality == 1).sum()),
        text=int((modality == 0).sum()),
        forced_text=1,
        forced_vision=0,
    )
    asked, moves = name, None
    if name == "symmetric":  # its router would have to be trained
        asked, moves = DareConfig.preset(name, scorer="key_norm", recent_tokens=0), RATES
    config = match_budget(model, asked, [prompt], target=target, of=of, moves=moves)
    with dare(model, config):
        generate(model, inputs, max_new_tokens=1)
        report = last_report(model)
    got = report.flops["prefill"] / report.flops_baseline["prefill"]
    got = report.kv_bytes / report.kv_bytes_baseline if of == "kv" else got
    assert got == pytest.approx(target, rel=0.011), name


def test_budgets_that_cannot_be_met_are_refused():
    model = model_of(attention="sdpa")
    prompt = [HopTokens(vision=540, text=20)]
    with pytest.raises(DareConfigError, match="nearest is"):
        match_budget(model, "fastv", prompt, target=0.05)
    with pytest.raises(DareConfigError, match="heima"):
        match_budget(model, "heima", prompt, target=0.5)
    with pytest.raises(DareInputError, match="share"):
        match_budget(model, "fastv", prompt, target=1.5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"recycle": True}, "recycle.*text_raters"),
        ({"hop_summary": 1, "hop_budget": "pooled"}, "hop_summary.*per_hop"),
        ({"schedule": "stages"}, "stages must"),
        ({"schedule": "stages", "stages": ((99, 1.0),)}, "stages must"),
        ({"scorer": "last_query", "schedule": "constant", "vision_retention": 0.5}, "first layer"),
    ],
)
def test_fields_that_do_nothing_alone_are_refused(fields, match):
    model = model_of(attention="sdpa")
    with pytest.raises(DareConfigError, match=match), dare(model, DareConfig(**fields)):
        pass


def test_an_attention_of_other_parts_is_refused_and_the_model_still_generates():
    model = model_of("gemma3", attention="sdpa")
    inputs = inputs_of(model, (2,))
    before = generate(model, inputs).sequences
    refused = pytest.raises(UnsupportedModelError, match="own_attention")
    with dare(model, DareConfig.preset("pyramiddrop")), refused:
        forward(model, inputs)
    assert generate(model, inputs).sequences.equal(before)


@pytest.mark.parametrize("name", [p.name for p in POLICIES if p.name != "symmetric"])
def test_every_policy_generates_and_says_what_it_simplifies(name):
    policy = next(p for p in POLICIES if p.name == name)
    assert policy.simplified
    model = model_of(attention="sdpa")
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, DareConfig.preset(name)):
        out = generate(model, inputs)
        assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS
        report = last_report(model)
    assert report.kv_bytes == report.kv_bytes_predicted
    restored = DareConfig(**DareConfig.preset(name).to_dict())
    assert restored.to_dict() == DareConfig.preset(name).to_dict()


def test_several_hidden_states_a_token_are_not_recycled():
    """Clusters would be written over streams instead of tokens."""
    model = shrunk_model("gemma3n")
    with pytest.raises(DareConfigError, match=r"recycle: .*'gemma3n'"):
        apply_dare(model, "sparsevlm")
    apply_dare(model, DareConfig.preset("sparsevlm", recycle=False))
