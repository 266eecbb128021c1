"""Models for evaluation harnesses; none of them is a dependency."""
