"""Baselines as presets: each says in fields of DareConfig what a published method prunes.

All keep original position ids, count FLOPs and bytes as DARE does, and never prune text that the
method keeps. A prompt's last token is kept by every policy. A policy that has no notion of hops
thins closed hops only where `hop_delimiters` are given: vision to its rates, by what the hop's last
queries attend to.
"""

from dare_hf.policies import (
    diverse,
    fastv,
    heima,
    pyramiddrop,
    random,
    sparsevlm,
    symmetric,
)
from dare_hf.policies.base import Policy

POLICIES: tuple[Policy, ...] = (
    diverse.POLICY,
    fastv.POLICY,
    heima.POLICY,
    pyramiddrop.POLICY,
    random.POLICY,
    sparsevlm.POLICY,
    symmetric.POLICY,
)

__all__ = ["POLICIES", "Policy"]
