"""`dare-hf demo`: the embedded model solves held-out mazes with and without DARE."""
