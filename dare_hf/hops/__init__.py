"""What the begin of a hop does to the cache: which tokens of closed hops stay."""
