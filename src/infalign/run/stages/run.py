"""What a run folder holds, for the stages that add to it and for those who use what they made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from infalign._io.inventory import read_object, require_whole, run_again
from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError, StorageError
from infalign.rollouts.models import load_policy
from infalign.rollouts.opening import open_policies, open_policy
from infalign.rollouts.policy import Policy
from infalign.rollouts.prompts import Prompt, PromptSet
from infalign.rollouts.store import RolloutStore
from infalign.run.folder import RECIPE, require_format
from infalign.run.recipe import Recipe, num_kept
from infalign.run.rewards import RunRewards
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.trust import Trust, policy_sections, reward_sections
from infalign.training.reward import TransformedReward


@dataclass(frozen=True)
class EvaluatedPolicy:
    """A policy that is evaluated.

    Attributes:
        name: Its name in tables and folders.
        folder: What `open_policy` opens.
        method: What it was trained with.
        reshaped: Whether it is the reshaped policy rather than the aligned model alone.
    """

    name: str
    folder: Path
    method: PlannedMethod
    reshaped: bool


class Run:
    """One recipe in one run folder: what every stage reads.

    Args:
        recipe: The experiment.
        out: The run folder.
        say: Tells the user one plain line.
    """

    def __init__(self, recipe: Recipe, out: Path, say: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.out = out
        self.say = say
        self.rewards = RunRewards(recipe, testbed_model=str(out / "models" / "reward"), moment=lambda: moment_of(out))

    @property
    def reference(self) -> str:
        """The reference policy: the recipe's, or the testbed's."""
        return self.recipe.policy.model or str(self.out / "models" / "reference")

    def calibrator(self) -> RewardCalibrator | CombinedCalibrator:
        """The calibration on the training prompts."""
        kind = CombinedCalibrator if self.rewards.combined else RewardCalibrator
        return kind.load(self.out / "calibration" / "calibrator")

    def transformed_reward(self, planned: PlannedMethod, *, mixture_weight: float = 1.0) -> TransformedReward:
        """What online training with one method maximises.

        Args:
            planned: The method.
            mixture_weight: The policy's share, for a trainer that trains inside a mixture with the reference (M19).

        Raises:
            InputError: If the method is a loss on stored rollouts.
        """
        return planned.method.reward(
            self.rewards.source(),
            self.calibrator(),
            self.prompts("train").ids,
            planned.beta,
            procedure=self.recipe.target_procedure,
            mixture_weight=mixture_weight,
        )

    def policy_folder(self, name: str) -> Path:
        """Where an aligned model is."""
        return self.out / "policies" / name / "model"

    def reshaped_folder(self, name: str) -> Path:
        """Where the reshaped policy of an aligned model is, with the fit that it comes from."""
        return self.out / "policies" / name / "reshaped"

    def kept_prompts(self) -> PromptSet:
        """The training prompts that no update sees: a landing is measured, and a reshaping fitted, on them."""
        prompts = self.prompts("train")
        return prompts[: num_kept(self.recipe, len(prompts))]

    def reshapes(self, planned: PlannedMethod) -> bool:
        """Whether the recipe asks for the reshaping of this method."""
        wanted = self.recipe.reshape
        return wanted.kind != "none" and (wanted.methods == "all" or planned.name == self.planned()[0].name)

    def evaluated(self) -> list[EvaluatedPolicy]:
        """What is evaluated, once all is trained and reshaped: the reshaped form of the recipe's own transform first.

        A model that was trained inside a mixture is a part of it, and not evaluated alone.
        """
        found: list[EvaluatedPolicy] = []
        for planned in self.planned():
            if self.reshapes(planned) and self.read_json(f"policies/{planned.name}/reshaped/reshape.json")["chosen"]:
                found.append(EvaluatedPolicy(planned.reshaped_name, self.reshaped_folder(planned.name), planned, True))
            if planned.mixture_weight == 1.0:
                found.append(EvaluatedPolicy(planned.name, self.policy_folder(planned.name), planned, False))
        return found

    def planned(self) -> list[PlannedMethod]:
        """The methods to align with; known once the plan is made."""
        plan = self.read_json("plan.json")
        return [PlannedMethod.from_dict(entry) for entry in (*plan["transforms"], *plan.get("baselines", ()))]

    def prompts(self, side: str) -> PromptSet:
        """The prompts of one side: `train` or `evaluation`."""
        return read_prompts(self.out, side)

    def store(self, folder: str) -> RolloutStore:
        """A rollout store of this run."""
        return RolloutStore.open(self.out / "rollouts" / folder)

    def read_json(self, name: str) -> Any:
        """A JSON file of this run.

        Raises:
            StorageError: If it is missing or damaged.
        """
        return read_object(self.out / name, hint=run_again(self.out))

    def pair(self, model: str) -> tuple[Policy, Policy]:
        """A policy and the reference, in memory once where one is an adapter on the other."""
        policy = self.recipe.policy
        flags = {"trust_remote_code": policy.trust_remote_code, "allow_pickle": policy.allow_pickle}
        aligned, reference = open_policies([model, self.reference], **flags)
        return aligned, reference

    def open(self, model: str) -> Policy:
        """A policy of this run."""
        policy = self.recipe.policy
        return open_policy(model, trust_remote_code=policy.trust_remote_code, allow_pickle=policy.allow_pickle)

    def load(self, model: str) -> Any:
        """A model of this run and its tokenizer."""
        policy = self.recipe.policy
        return load_policy(model, trust_remote_code=policy.trust_remote_code, allow_pickle=policy.allow_pickle)


def open_run(run_folder: str | Path, trust: Trust | None = None, *, rewards: bool = True) -> Run:
    """A calibrated run, to read from.

    Args:
        run_folder: Its folder.
        trust: What its recipe is allowed; nothing by default.
        rewards: Whether its rewards are going to be opened.

    Raises:
        StorageError: If the folder does not hold one, or what it holds is damaged.
        MismatchError: If another version wrote it in a form that this one would misread.
        InputError: If its recipe is of another version, or would do what it is not allowed.
    """
    folder = Path(run_folder)
    if not (folder / "run.json").exists():
        raise StorageError(
            "this is not a run folder" if folder.is_dir() else "there is no such folder",
            where=str(folder),
            hint="Give the folder that `infalign run` wrote, runs/NAME by default",
        )
    require_format(folder)
    missing = [name for name in (RECIPE, "plan.json", "calibration/calibrator") if not (folder / name).exists()]
    if missing:
        raise StorageError(
            f"this folder holds no calibrated run (there is no {missing[0]})",
            where=str(folder),
            hint="Do `infalign calibrate` with its recipe first; what is done already is kept",
        )
    require_whole(folder, ["prompts", "calibration", "procedure", "plan"])
    recipe = read_recipe(folder)
    sections = [*policy_sections(recipe), *(reward_sections(recipe) if rewards else ())]
    (trust or Trust()).require(sections, folder)
    return Run(recipe, folder, say=lambda text: None)


def read_recipe(run_folder: Path) -> Recipe:
    """The recipe that a calibrated run was made with.

    Raises:
        StorageError: If there is none.
        InputError: If it is of another version.
    """
    path = run_folder / RECIPE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(
            f"the run's recipe cannot be read ({error})",
            where=str(path),
            hint="Do `infalign calibrate` with its recipe; what is done already is kept",
        ) from error
    try:
        return Recipe.model_validate(content)
    except ValueError as error:
        raise InputError(
            f"the run's recipe is of another version ({error})", where=str(path), hint="Make the run again"
        ) from error


def read_prompts(run_folder: Path, side: str) -> PromptSet:
    """The prompts that a run wrote down for one side: `train` or `evaluation`.

    Raises:
        StorageError: If they cannot be read.
    """
    path = run_folder / "prompts" / f"{side}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise StorageError(
            f"the run's prompts cannot be read ({error.strerror})", where=str(path), hint="Is this a run folder?"
        ) from error
    except UnicodeDecodeError as error:
        raise StorageError("the run's prompts are damaged", where=str(path), hint=run_again(run_folder)) from error
    try:
        rows = [json.loads(line) for line in lines if line]
        return PromptSet(tuple(Prompt(row["prompt"], row["row"], rendered_at=row.get("rendered_at")) for row in rows))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError("the run's prompts are damaged", where=str(path), hint=run_again(run_folder)) from error


def prompt_lines(prompts: Sequence[Prompt]) -> str:
    """Prompts as a folder keeps them, for `read_prompts`: JSON lines, with the moment that they are rendered at."""
    rows = [{"id": p.id, "prompt": p.prompt, "row": p.row, "rendered_at": p.rendered_at} for p in prompts]
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def moment_of(run_folder: Path) -> str | None:
    """The moment that a folder's chat prompts are rendered at (`Prompt.rendered_at`); None if it holds no prompts."""
    for side in ("train", "evaluation"):
        try:
            with (run_folder / "prompts" / f"{side}.jsonl").open(encoding="utf-8") as lines:
                moment = json.loads(next(lines)).get("rendered_at")
                datetime.fromisoformat(moment)
                return moment
        except (OSError, ValueError, TypeError, AttributeError, StopIteration, RecursionError):
            continue  # what is wrong with the file is said by those who need its prompts
    return None


def run_of(model: str) -> Path | None:
    """The run folder that a model lies in, if it does."""
    path = Path(model).resolve()
    return next((parent for parent in path.parents if (parent / "run.json").is_file()), None)
