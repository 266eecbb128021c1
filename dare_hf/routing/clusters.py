"""Clusters of what a selection drops, whose means stay: SparseVLM's token recycling."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dare_hf.routing.kinds import VISION


class Merged(NamedTuple):
    """Vectors that take the places of tokens, in the layer that has selected.

    Attributes:
        layer: That layer.
        rows: Long[N] the row of each.
        columns: Long[N] its column.
        vectors: Float[N, D].
    """

    layer: int
    rows: Int[Tensor, " merged"]
    columns: Int[Tensor, " merged"]
    vectors: Float[Tensor, "merged dim"]


def recycled(dropped: int) -> tuple[int, int]:
    """How many of `dropped` tokens are recycled, and into how many clusters.

    Source: SparseVLM's released code: 30 % of them and one, a tenth of these and one.
    """
    if dropped == 0:
        return 0, 0
    taken = min(3 * dropped // 10 + 1, dropped)
    return taken, min(taken // 10 + 1, taken)


def room_for_clusters(budget: int, available: int) -> int:
    """How many of a vision budget are clusters, so that kept and clusters together fill it.

    Law: k kept ones leave ``available - k`` to recycle; the largest k that fits.
    """
    for kept in range(min(budget, available), -1, -1):
        clusters = recycled(available - kept)[1]
        if kept + clusters <= budget:
            return clusters
    return budget


def merged_tokens(
    layer: int,
    hidden: Float[Tensor, "batch tokens dim"],
    scores: Float[Tensor, "batch tokens"],
    modality: Int[Tensor, "batch tokens"],
    candidates: Bool[Tensor, "batch tokens"],
    keep: Bool[Tensor, "batch tokens"],
    clusters: list[int],
) -> Merged | None:
    """The means of the clusters of each row, in the places of its first dropped vision tokens.

    Args:
        layer: The layer that selects.
        hidden: What enters it.
        scores: What it selects by.
        modality: TEXT, VISION or PAD.
        candidates: Columns that it could keep.
        keep: Those it keeps; clusters are not among them.
        clusters: Per row how many there are to be.

    Returns:
        None where no row has any.
    """
    rows, columns, vectors = [], [], []
    for row, count in enumerate(clusters):
        if not count:
            continue
        dropped = (candidates & ~keep & (modality == VISION))[row].nonzero()[:, 0]
        taken = max(recycled(len(dropped))[0], count)
        order = scores[row, dropped].argsort(descending=True, stable=True)
        best = dropped[order[:taken]].sort().values
        rows.append(torch.full((count,), row, device=hidden.device))
        columns.append(dropped[:count])
        vectors.append(density_peaks(hidden[row, best], count))
    if not rows:
        return None
    return Merged(layer, torch.cat(rows), torch.cat(columns), torch.cat(vectors))


def density_peaks(
    points: Float[Tensor, "points dim"], clusters: int
) -> Float[Tensor, "clusters dim"]:
    """Means of the clusters around density peaks, in the order of their centres' columns.

    Density is ``exp(-mean of the squared distances to the nearest)``, as many as clusters, the
    point itself among them; a centre has a large product of density and distance to the nearest
    point of higher density (of the densest: the largest distance). Distances are over sqrt(dim).

    Source: Du et al. 2016 (DPC-kNN), as SparseVLM uses it.
    """
    wide = points.float()
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / points.shape[1] ** 0.5
    near = distance.topk(min(clusters, len(points)), largest=False).values
    density = (-near.square().mean(1)).exp()
    denser = density[None, :] > density[:, None]
    apart = distance.masked_fill(~denser, torch.inf).min(1).values
    apart = torch.where(apart.isinf(), distance.max(), apart)
    centres = (density * apart).argsort(descending=True, stable=True)[:clusters].sort().values
    member = distance[:, centres].argmin(1)
    member[centres] = torch.arange(clusters, device=points.device)
    share = torch.nn.functional.one_hot(member, clusters).to(wide.dtype)
    return ((share.T @ wide) / share.sum(0)[:, None]).to(points.dtype)
