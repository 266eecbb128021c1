"""Which models can be routed, and where their decoder layers are: architectures as data."""
