"""Who scores tokens: the built-in scorers, and the registry of the user's own."""
