"""The whole recipe: its sections, and what must fit between them."""

# ruff: noqa: RUF012 (pydantic copies its defaults; ruff knows that only of a direct subclass of BaseModel)

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.procedures.measured import MeasuredProcedure
from infalign.run.recipe.sections import (
    Calibration,
    Evaluation,
    Policy,
    Prompts,
    Reshape,
    Reward,
    Rewards,
    Rollouts,
    Section,
    Testbed,
    Training,
    reshape_value,
)
from infalign.run.recipe.values import NAME, Compared, Positive, Procedure, Transform, transform_name
from infalign.training.methods import Comparator, SelfConsistentMethod, comparator_from_dict


class Recipe(Section):
    """One experiment. See `recipes/` for worked examples."""

    name: str = Field(pattern=NAME)  # it names the run folder
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    testbed: Testbed | None = None
    policy: Policy = Policy()
    reward: Rewards = [Reward()]  # one, or a list of several that are combined after calibration
    prompts: Prompts = Prompts()
    procedure: Procedure = {"kind": "best-of-n", "n": 4}
    rollouts: Rollouts = Rollouts()
    calibration: Calibration = Calibration()
    transform: Transform = "optimal"
    compare_with: list[Compared] = ["identity"]
    beta: Positive | None = None
    kl_budget: Positive | None = None
    training: Training = Training()
    reshape: Annotated[Reshape, BeforeValidator(reshape_value)] = Reshape(kind="none")
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.beta is None) == (self.kl_budget is None):
            raise ValueError("give exactly one of beta and kl_budget")
        if len(self.reward) > 1 and not all(reward.given for reward in self.reward):
            raise ValueError("each of several rewards needs its model, function or url")
        url_of: dict[str | None, str] = {}
        for reward in (*self.reward, *self.evaluation.gold):  # a server's rewards are stored under its name
            if reward.url is not None and url_of.setdefault(reward.name, reward.url) != reward.url:
                raise ValueError(f"two rewards with different urls are called {reward.name}; give each its own name")
        if self.testbed is None:
            for section, given in (
                ("policy.model", self.policy.model),
                ("reward.model, reward.function or reward.url", self.reward[0].given or None),
                ("prompts.source", self.prompts.source),
            ):
                if given is None:
                    raise ValueError(f"{section} is missing (only a recipe with a testbed can do without)")
        elif self.testbed.corpus is None and self.prompts.source is None:
            raise ValueError("prompts.source is missing (only the docstrings testbed brings its own prompts)")
        if any("decoder" in p for p in self.evaluation.procedures):
            raise ValueError("a decoder can only be the recipe's own procedure, not one of evaluation.procedures")
        if self.measured_procedure is not None and len(self.reward) > 1:
            raise ValueError("a procedure with a decoder is measured by one reward, not by several")
        needed = max((procedure_from_dict(p).n or 1) for p in self.evaluation.procedures)
        if self.evaluation.num_samples < needed:
            raise ValueError(
                f"evaluation.num_samples is {self.evaluation.num_samples}, but its procedures draw up to {needed}"
            )
        trained = [(one.model, one.function, one.url) for one in self.reward if one.given]
        for gold in self.evaluation.gold:
            if (gold.model, gold.function, gold.url) in trained:
                raise ValueError(f"the gold reward {gold.label} is trained on, so it tells nothing new")
        own, *others = map(transform_name, self.transforms)
        if self.training.mixture != "none":
            own += "-mixture"  # beside the same transform alone
        names = [own, *others, *(one.name for one in self.comparators)]
        if len(set(names)) != len(names):
            raise ValueError(f"compare_with repeats a transform: {', '.join(names)}")
        if self.training.solver not in SelfConsistentMethod.SOLVERS and "self-consistent" in names:
            raise ValueError(
                f"the self-consistent transform follows the policy's own rollouts; with training.solver "
                f"{self.training.solver} use optimal"
            )
        if self.training.mixture != "none" and self.training.solver != "online":
            raise ValueError(
                f"training inside a mixture is online training; with training.solver {self.training.solver} leave "
                "training.mixture out"
            )
        if self.measured_procedure is not None and self.reshape.kind != "none":
            raise ValueError("a decoder runs one model, not a reshaped policy: leave reshape out")
        if self.training.mixture != "none" and self.reshape.kind == "none":
            raise ValueError(
                "a model that was trained inside a mixture is used as a part of it: give reshape: auto with "
                "training.mixture"
            )
        if self.training.solver == "mixed" and self.training.steps <= self.training.refresh_every:
            raise ValueError(
                f"training.refresh_every is {self.training.refresh_every}, so that {self.training.steps} steps of "
                "mixed training would see no fresh rollouts; make it smaller"
            )
        if "reference" in names:
            raise ValueError("a transform file cannot be called reference: its name names the aligned policy")
        return self

    @property
    def transforms(self) -> list[str | dict[str, Any]]:
        """The recipe's transform and those it is compared with."""
        others = [one for one in self.compare_with if not (isinstance(one, dict) and "baseline" in one)]
        return [self.transform, *others]

    @property
    def comparators(self) -> list[Comparator]:
        """The methods of others that it is compared with."""
        found = [one for one in self.compare_with if isinstance(one, dict) and "baseline" in one]
        return [comparator_from_dict(one) for one in found]

    @property
    def measured_procedure(self) -> MeasuredProcedure | None:
        """The decoder whose procedure has yet to be measured; None for a procedure that is known."""
        return MeasuredProcedure.parse(self.procedure) if "decoder" in self.procedure else None

    def with_procedure(self, procedure: InferenceProcedure) -> Recipe:
        """The same recipe for a procedure that is known."""
        return self.model_copy(update={"procedure": procedure.to_dict()})

    @property
    def target_procedure(self) -> InferenceProcedure:
        """The procedure that the model will be used through; a decoder must have been measured first."""
        return procedure_from_dict(self.procedure)

    @property
    def evaluation_procedures(self) -> list[InferenceProcedure]:
        """The procedures evaluated; the target procedure is always among them."""
        procedures = [procedure_from_dict(p) for p in self.evaluation.procedures]
        return procedures if self.target_procedure in procedures else [*procedures, self.target_procedure]


KEPT_SHARE, MOST_KEPT = 4, 128  # one training prompt in four, and so many at most


def num_kept(recipe: Recipe, num_prompts: int) -> int:
    """How many of the training prompts no update sees: a landing is measured, and a reshaping fitted, on them."""
    wanted = recipe.kl_budget is not None or recipe.reshape.kind != "none"
    return min(num_prompts // KEPT_SHARE, MOST_KEPT) if wanted else 0
