"""Routers: the trained weights of one layer, and how they sit on a model."""
