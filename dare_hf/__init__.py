"""Dynamic and asymmetric token routing for vision-language models of transformers."""

__version__ = "0.1.0.dev0"
