"""The experiment as one typed YAML file.

Unknown keys are refused with a suggestion; relative paths are relative to the recipe's own folder.
"""

from infalign.run.recipe.experiment import Recipe, num_kept
from infalign.run.recipe.load import load_recipe, parse_recipe
from infalign.run.recipe.sections import GoldReward, Policy, Reward, RolloutEndpoint, Rows, Training
from infalign.run.recipe.values import named_transform, transform_name

__all__ = [
    "GoldReward",
    "Policy",
    "Recipe",
    "Reward",
    "RolloutEndpoint",
    "Rows",
    "Training",
    "load_recipe",
    "named_transform",
    "num_kept",
    "parse_recipe",
    "transform_name",
]
