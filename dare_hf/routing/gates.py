"""Gates: the hard selection's values with the gradient of a soft one (straight-through)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Added to a gate before its logarithm: exact at gate 0 to float noise, and its gradient is finite.
FLOOR = 1e-20
# Halvings of the threshold's bracket before Newton's steps.
_HALVINGS = 30
# The bracket reaches this many temperatures beyond the scores: sigmoid(-30) is 1e-13.
_REACH = 30.0
# A budget this near 0 or all tokens is 0 or all: no threshold gives it in float32.
_EDGE = 1e-4
# Under this sum of slopes (tokens in transition) the threshold is held: it moves no gate.
_FLAT = 1e-6


def passed(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 in value, with the gradient of `x`: ``x - stopgrad(x)``."""
    return x - x.detach()


def straight_through(
    hard: Bool[Tensor, "*shape"], soft: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """``hard + soft - stopgrad(soft)``: the value is exactly `hard`, the gradient `soft`'s.

    Source: docs/method.md, section 7.
    """
    return hard.to(soft.dtype) + passed(soft)


def log_gates(gates: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log(g + 1e-20)``, what a gate adds to the attention logits of its column.

    Source: docs/method.md, section 7.
    """
    return (gates + FLOOR).log()


def soft_topk(
    scores: Float[Tensor, "*groups tokens"],
    k: Float[Tensor, "*groups"],
    candidates: Bool[Tensor, "*groups tokens"],
    forced: Bool[Tensor, "*groups tokens"],
    temperature: float,
) -> Float[Tensor, "*groups tokens"]:
    """``sigmoid((s - t) / T)`` with t solved so that the gates of each group sum to k.

    Forced candidates are 1 and count; other columns are 0. Where k leaves nothing, or everything,
    to the candidates that are not forced, those are 0, or 1, and have no gradient. The gradient to
    scores and k is the implicit one, through a last Newton step at the solution.

    Args:
        scores: the higher, the sooner; a group is one competition.
        k: gates to give out, ``rho * n``: any real number.
        candidates: columns that compete.
        forced: columns that are kept where they are candidates.
        temperature: T > 0; towards 0 the gates become the hard top-k.

    Source: docs/method.md, section 7 (selector "soft_topk").
    """
    free, wanted, most = _free(scores, k, candidates, forced)
    open_ = ((wanted > _EDGE) & (wanted < most - _EDGE))[..., None]
    start = _threshold(scores.detach(), wanted.detach(), free, temperature)[..., None]
    gates = torch.sigmoid((scores - start) / temperature) * free
    slope = (gates * (1 - gates)).sum(-1, keepdim=True).detach()
    flat = slope < _FLAT
    excess = gates.sum(-1, keepdim=True) - wanted[..., None]
    step = excess * temperature / slope.masked_fill(flat, 1.0)
    threshold = start + step.masked_fill(flat | ~open_, 0.0)
    soft = torch.sigmoid((scores - threshold) / temperature)
    return _assemble(soft, free, open_, wanted, candidates & forced)


def gumbel(
    scores: Float[Tensor, "*groups tokens"],
    k: Float[Tensor, "*groups"],
    candidates: Bool[Tensor, "*groups tokens"],
    forced: Bool[Tensor, "*groups tokens"],
    tau: float,
) -> Float[Tensor, "*groups tokens"]:
    """``min(1, k * softmax(s / tau))`` over each group's candidates, k less the forced ones.

    Args:
        scores: scores, with `gumbel_noise` added while training.
        k: gates to give out, ``rho * n``: any real number.
        candidates: columns that compete.
        forced: columns that are kept where they are candidates; their gate is 1.
        tau: temperature > 0.

    Source: the paper's Gumbel-softmax selection; docs/method.md, section 7 (selector "gumbel").
    """
    free, wanted, most = _free(scores, k, candidates, forced)
    open_ = ((wanted > _EDGE) & (wanted < most - _EDGE))[..., None]
    logits = (scores / tau).masked_fill(~free, torch.finfo(scores.dtype).min)
    soft = (wanted[..., None] * logits.softmax(-1)).clamp(max=1.0)
    return _assemble(soft, free, open_, wanted, candidates & forced)


def gumbel_noise(
    like: Float[Tensor, "*shape"], generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Independent draws of Gumbel(0, 1), ``-log(Exponential(1))``, shaped as `like`.

    Args:
        like: gives shape, dtype and device.
        generator: on the CPU, so that all devices draw the same.
    """
    drawn = torch.empty(like.shape, dtype=torch.float64).exponential_(generator=generator)
    return -drawn.log().to(like)


def _free(
    scores: Tensor, k: Tensor, candidates: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates that are not forced, what k leaves for them, and how many they are."""
    free = candidates & ~forced
    taken = (candidates & forced).sum(-1)
    return free, k - taken.to(k.dtype), free.sum(-1).to(scores.dtype)


def _assemble(soft: Tensor, free: Tensor, open_: Tensor, wanted: Tensor, must: Tensor) -> Tensor:
    full = (wanted > _EDGE)[..., None].to(soft.dtype).expand_as(soft)
    gates = torch.where(open_, soft, full) * free
    return gates + must.to(soft.dtype)


@torch.no_grad()
def _threshold(scores: Tensor, k: Tensor, free: Tensor, temperature: float) -> Tensor:
    """Each group's t by bisection and two Newton steps; any value where nothing is free."""
    big = torch.finfo(scores.dtype).max
    reach = _REACH * temperature
    low = scores.masked_fill(~free, big).amin(-1).clamp(max=big / 4) - reach
    high = scores.masked_fill(~free, -big).amax(-1).clamp(min=-big / 4) + reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        total = (torch.sigmoid((scores - middle[..., None]) / temperature) * free).sum(-1)
        low, high = torch.where(total > k, middle, low), torch.where(total > k, high, middle)
    found = (low + high) / 2
    for _ in range(2):
        gates = torch.sigmoid((scores - found[..., None]) / temperature) * free
        slope = (gates * (1 - gates)).sum(-1)
        flat = slope < _FLAT
        step = (gates.sum(-1) - k) * temperature / slope.masked_fill(flat, 1.0)
        # a step beyond one temperature is none of a converged bisection
        found = found + step.masked_fill(flat, 0.0).clamp(-temperature, temperature)
    return found
