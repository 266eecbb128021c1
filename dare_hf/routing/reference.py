"""The slow oracle: the same definitions as the fast files, as loops over Python numbers.

Fast code never imports this file. Each function has the signature of its fast namesake, and its law
and source are documented there.
"""

import math

import torch
from torch import Tensor

from dare_hf.routing.kinds import PAD, TEXT, VISION


def budget(rate: float, count: int) -> int:
    """The smallest k >= 1 that reaches ``rate * count``, at most `count`."""
    k = min(1, count)
    while k < count and k < rate * count - 1e-4:
        k += 1
    return k


def keep_mask(
    scores: Tensor,
    modality: Tensor,
    candidates: Tensor,
    forced: Tensor,
    budgets: Tensor,
    max_budget: tuple[int, int] | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Sort each row's candidates by (forced, first, score, column) and take the budget."""
    kept = torch.zeros_like(candidates)
    for row in range(scores.shape[0]):
        for kind in (TEXT, VISION):
            able = [
                column
                for column in range(scores.shape[1])
                if candidates[row, column] and modality[row, column] == kind
            ]
            must = [column for column in able if forced[row, column]]

            def rank(column: int, row: int = row) -> tuple[bool, float, int]:
                score = scores[row, column].item()
                taken_first = first is not None and bool(first[row, column])
                return not taken_first, math.inf if math.isnan(score) else -score, column

            others = sorted((column for column in able if column not in must), key=rank)
            for column in must + others[: max(int(budgets[row, kind]) - len(must), 0)]:
                kept[row, column] = True
    return kept


def compaction_keep(
    scores: Tensor,
    modality: Tensor,
    hop: Tensor,
    candidates: Tensor,
    forced: Tensor,
    budgets: Tensor,
) -> Tensor:
    """One competition if there is one budget, else one competition per hop."""
    kept = torch.zeros_like(candidates)
    for index in range(budgets.shape[1]):
        competes = candidates if budgets.shape[1] == 1 else candidates & (hop == index)
        kept |= keep_mask(scores, modality, competes, forced, budgets[:, index])
    return kept


def capped_keep(scores: Tensor, keep: Tensor, tiers: list[Tensor], cap: int) -> Tensor:
    """Sort each row's columns by (first tier they are in, score outside of all, column)."""
    kept = torch.zeros_like(keep)
    for row in range(keep.shape[0]):

        def rank(column: int, row: int = row) -> tuple[int, float, int]:
            mine = [place for place, tier in enumerate(tiers) if tier[row, column]]
            score = scores[row, column].item()
            lowest = math.inf if math.isnan(score) else -score
            return (mine[0], 0.0, column) if mine else (len(tiers), lowest, column)

        able = [column for column in range(keep.shape[1]) if keep[row, column]]
        kept[row, sorted(able, key=rank)[:cap]] = True
    return kept


def gather_index(keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Per row: the first not-kept columns as fills, then the kept columns."""
    indices, lives = [], []
    for row in keep.tolist():
        kept = [column for column, is_kept in enumerate(row) if is_kept]
        rest = [column for column, is_kept in enumerate(row) if not is_kept]
        fills = width - len(kept)
        indices.append(rest[:fills] + kept)
        lives.append([False] * fills + [True] * len(kept))
    shape = (keep.shape[0], width)
    return torch.tensor(indices).long().view(shape), torch.tensor(lives).bool().view(shape)


def even_grid(
    modality: Tensor, candidates: Tensor, forced: Tensor, vision_budget: Tensor, share: float
) -> Tensor:
    """Deal the row's quota to its images by cumulative rounding, then space each part evenly."""
    grid = torch.zeros_like(candidates)
    for row in range(modality.shape[0]):
        images = _images(modality[row].tolist())
        images = [[column for column in image if candidates[row, column]] for image in images]
        total = sum(len(image) for image in images)
        forced_count = sum(bool(forced[row, column]) for image in images for column in image)
        k = min(int(vision_budget[row]), total)
        quota = min(round(share * 1_000_000) * k // 1_000_000, max(k - forced_count, 0))
        before = 0
        for image in images:
            end = before + len(image)
            part = quota * end // total - quota * before // total if total else 0
            for j in range(part):
                # First rank r with (r + 1) * part >= (j + 1) * n - n // 2, the middle of its part.
                edge = (j + 1) * len(image) - len(image) // 2
                grid[row, image[-(-edge // part) - 1]] = True
            before = end
    return grid


def _images(kinds: list[int]) -> list[list[int]]:
    images: list[list[int]] = []
    inside = False
    for column, kind in enumerate(kinds):
        if kind == VISION:
            if not inside:
                images.append([])
            images[-1].append(column)
        if kind != PAD:
            inside = kind == VISION
    return images


def forced_tokens(
    span: Tensor,
    *,
    prefix_tokens: int,
    already: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Count the hop's tokens from its beginning; add the span's last token and `always`."""
    forced = torch.zeros_like(span)
    for row in range(span.shape[0]):
        columns = [column for column in range(span.shape[1]) if span[row, column]]
        before = 0 if already is None else int(already[row])
        for place, column in enumerate(columns, start=before + 1):
            wanted = always is not None and bool(always[row, column])
            forced[row, column] = place <= prefix_tokens or column == columns[-1] or wanted
    return forced


def hop_prefix_mask(valid: Tensor, hop: Tensor, n: int) -> Tensor:
    """Count each hop's tokens from its beginning."""
    found = torch.zeros_like(valid)
    for row in range(valid.shape[0]):
        counts: dict[int, int] = {}
        for column in range(valid.shape[1]):
            if valid[row, column]:
                own = int(hop[row, column])
                counts[own] = counts.get(own, 0) + 1
                found[row, column] = counts[own] <= n
    return found


def newest(valid: Tensor, count: int | Tensor) -> Tensor:
    """Walk back from the end and take columns until there are enough."""
    found = torch.zeros_like(valid)
    for row in range(valid.shape[0]):
        left = int(count) if isinstance(count, int) else int(count[row])
        for column in reversed(range(valid.shape[1])):
            if valid[row, column] and left > 0:
                found[row, column] = True
                left -= 1
    return found


def newest_text(
    modality: Tensor, candidates: Tensor, forced: Tensor, text_budget: Tensor, share: float
) -> Tensor:
    """Walk back over the text: as many as the share gives, while forced ones leave room."""
    found = torch.zeros_like(candidates)
    for row in range(modality.shape[0]):
        able = [
            column
            for column in range(modality.shape[1])
            if candidates[row, column] and modality[row, column] == TEXT
        ]
        k = min(int(text_budget[row]), len(able))
        quota = round(share * 1_000_000) * k // 1_000_000
        room = k - sum(bool(forced[row, column]) for column in able)
        for column in reversed(able[len(able) - quota :]):
            if not forced[row, column] and room > 0:
                found[row, column] = True
                room -= 1
    return found


def image_borders(modality: Tensor) -> Tensor:
    """Look at both real neighbours of each text token."""
    found = torch.zeros_like(modality, dtype=torch.bool)
    for row, kinds in enumerate(modality.tolist()):
        real = [column for column, kind in enumerate(kinds) if kind != PAD]
        for place, column in enumerate(real):
            near = real[max(place - 1, 0) : place] + real[place + 1 : place + 2]
            touches = any(kinds[other] == VISION for other in near)
            found[row, column] = kinds[column] == TEXT and touches
    return found


def router_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor, modality: Tensor, normalize: bool
) -> Tensor:
    """One dot product per token, in Python floats."""
    scores = torch.zeros(hidden.shape[:2])
    for row in range(hidden.shape[0]):
        for column in range(hidden.shape[1]):
            x = hidden[row, column].double().tolist()
            kind = max(int(modality[row, column]), 0)
            scale = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6) if normalize else 1.0
            products = zip(weight[kind].tolist(), x, strict=True)
            logit = sum(w * v / scale for w, v in products) + float(bias[kind])
            scores[row, column] = 1 / (1 + math.exp(-logit))
    return scores


def random_scores(seed: int, layer: int, local_index: Tensor) -> Tensor:
    """The hash, on Python's unbounded integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    key = mix(mix(mix(seed % 2**32) ^ (seed >> 32) % 2**32) ^ layer)
    rows = [
        [mix(index % 2**32 ^ key) // 256 / 2**24 for index in row] for row in local_index.tolist()
    ]
    return torch.tensor(rows).view(local_index.shape)


def position_scores(local_index: Tensor) -> Tensor:
    """``1 / (1 + i)``."""
    return torch.tensor([[1 / (1 + index) for index in row] for row in local_index.tolist()])


def recent_scores(local_index: Tensor) -> Tensor:
    """``i / 2**24``."""
    rows = [[index / 2**24 for index in row] for row in local_index.tolist()]
    return torch.tensor(rows).view(local_index.shape)


def key_norm_scores(keys: Tensor) -> Tensor:
    """``1 / (1 + mean norm)``, key by key."""
    batch, heads, tokens, _ = keys.shape
    scores = torch.zeros(batch, tokens)
    for row in range(batch):
        for column in range(tokens):
            norms = [math.hypot(*keys[row, head, column].tolist()) for head in range(heads)]
            scores[row, column] = 1 / (1 + sum(norms) / heads)
    return scores


def attention_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    query_valid: Tensor,
    span: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Head by head and query by query: softmax over what it sees, times the value's norm."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    visible = visible.expand(batch, heads, queries, key.shape[2])
    scores = torch.zeros(batch, key.shape[2], dtype=torch.float64)
    for row in range(batch):
        valid = [w for w in range(queries) if query_valid[row, w]]
        seen: set[int] = set()
        for head in range(heads):
            for w in valid:
                columns = [c for c in range(key.shape[2]) if visible[row, head, w, c]]
                seen.update(columns)
                logits = [
                    scaling
                    * float(query[row, head, w].double() @ key[row, head // group, c].double())
                    for c in columns
                ]
                if softcap is not None:
                    logits = [softcap * math.tanh(logit / softcap) for logit in logits]
                total = sum(math.exp(logit - max(logits)) for logit in logits)
                if sinks is not None and logits:
                    total += math.exp(float(sinks[head]) - max(logits))
                for c, logit in zip(columns, logits, strict=True):
                    mass = math.exp(logit - max(logits)) / total / (heads * len(valid))
                    scores[row, c] += mass * math.hypot(*value[row, head // group, c].tolist())
        scores[row] *= span[row]
        counted = [float(scores[row, c]) for c in sorted(seen) if span[row, c]]
        if counted and sum(counted) > 0:
            scores[row] /= sum(counted) / len(counted)
    return scores
