"""Forwards that are recorded as a graph: refused."""

import torch

from dare_hf.errors import DareStateError


@torch.compiler.assume_constant_result  # so that a strict export lets the error through
def check_recorded() -> None:
    """Refuse an export: which tokens run is chosen anew for each input, not once for all."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise DareStateError(
            "torch.export, torch.jit.trace: expected a model without DARE, whose graph is the same "
            "for each input; got one that chooses which tokens run. Export it inside `with "
            "dare_disabled(model)`, or call remove_dare(model) first"
        )
