"""What a run folder may make this process do: nothing that runs code or asks a server, unless whoever opens it says so.

A recipe is a program that its user has read; a run folder may come from anywhere. The permissions that its recipe.json
claims are therefore not taken from it: they are given on the command line, or as an argument in Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from infalign.errors import InputError
from infalign.run.recipe import Policy, Recipe, Reward


@dataclass(frozen=True)
class Trust:
    """What a run folder's recipe is allowed.

    Attributes:
        remote_code: Run Python code that comes with a model (`trust_remote_code`).
        pickle: Read weights that are not safetensors (`allow_pickle`).
        rewards: Import the functions and ask the servers that it names as rewards.
    """

    remote_code: bool = False
    pickle: bool = False
    rewards: bool = False

    def require(self, sections: Iterable[tuple[str, Policy | Reward]], where: Path) -> None:
        """Refuse a recipe that needs more than it is allowed.

        Args:
            sections: The sections that are going to be used, each with its name in the recipe.
            where: The run folder.

        Raises:
            InputError: Saying what it would do, and which option allows it.
        """
        for name, section in sections:
            if section.trust_remote_code and not self.remote_code:
                raise _refusal(where, f"run Python code that comes with a model ({name}.trust_remote_code)",
                               "--trust-remote-code")  # fmt: skip
            if section.allow_pickle and not self.pickle:
                raise _refusal(where, f"read weights that can run code ({name}.allow_pickle)", "--allow-pickle")
            if isinstance(section, Reward) and not self.rewards:
                if section.function is not None:
                    raise _refusal(where, f"import and run the function {section.function} ({name})", "--trust-run")
                if section.url is not None:
                    raise _refusal(where, f"send prompts and responses to {section.name} ({name}.url)", "--trust-run")


def reward_sections(recipe: Recipe) -> list[tuple[str, Policy | Reward]]:
    """The recipe's rewards with their names in it."""
    if len(recipe.reward) == 1:
        return [("reward", recipe.reward[0])]
    return [(f"reward.{number}", reward) for number, reward in enumerate(recipe.reward)]


def policy_sections(recipe: Recipe) -> list[tuple[str, Policy | Reward]]:
    """The recipe's policy with its name in it."""
    return [("policy", recipe.policy)]


def gold_sections(recipe: Recipe) -> list[tuple[str, Policy | Reward]]:
    """The recipe's gold rewards with their names in it."""
    return [(f"evaluation.gold {gold.label}", gold) for gold in recipe.evaluation.gold]


def _refusal(where: Path, what: str, option: str) -> InputError:
    return InputError(
        f"the recipe in this run folder would {what}",
        where=str(where),
        hint=f"Add {option} if you trust the folder (docs/trust.md)",
    )
