"""Recipes: a router, alone or with LoRA, trained from one file."""

from dare_hf.recipes.recipe import Recipe, load_recipe
from dare_hf.recipes.run import TrainingResult, train

__all__ = ["Recipe", "TrainingResult", "load_recipe", "train"]
