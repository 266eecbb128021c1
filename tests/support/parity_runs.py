"""A run of generate beside the training forward over the same tokens."""

from laws import (
    FP32_TOLERANCE,
    assert_close,
)


def hold_steps(out, logits, span, *, what):
    """Hold every step of a generate to a full-length forward's logits [B, S, V]."""
    for step, step_logits in enumerate(out.logits):
        theirs = logits[:, span - 1 + step].to(step_logits.dtype)
        assert_close(step_logits, theirs, tolerance=FP32_TOLERANCE, what=f"{what}: step {step}")
