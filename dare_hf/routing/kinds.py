"""What a column holds. Budgets, counts and router weights are indexed by TEXT and VISION."""

PAD = -1
TEXT = 0
VISION = 1
