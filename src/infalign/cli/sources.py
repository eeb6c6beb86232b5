"""What several verbs name on the command line: rewards and calibrations."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infalign.errors import InputError, MismatchError
from infalign.wording import counted

if TYPE_CHECKING:
    from infalign.calibration import RewardCalibrator
    from infalign.combined_calibration import CombinedCalibrator
    from infalign.data import PromptSet
    from infalign.rollouts.rewards import RewardSource

REWARD = "a reward model's folder or hub name, module:function, or http(s)://…"


def refuse_idle(verb: str, how: str, options: Mapping[str, object]) -> None:
    """Refuse options that would silently do nothing.

    Args:
        verb: The command.
        how: Why they would do nothing, such as `without --prompts`.
        options: Their values by name; None where one is not given.

    Raises:
        InputError: One is given.
    """
    for name, value in options.items():
        if value is not None:
            raise InputError(f"{name} does nothing {how}", where=verb, mend="Leave it out")


def told_duplicates(prompts: PromptSet, source: str | Path) -> str:
    """How many rows of a file were left out because their prompt had come before, as a sentence."""
    if prompts.duplicates == 1:
        return f"1 row of {source} repeats a prompt and is left out"
    return f"{counted(prompts.duplicates, 'row')} of {source} repeat a prompt and are left out"


def open_named_reward(
    name: str, *, trust_remote_code: bool = False, allow_pickle: bool = False, **patience: Any
) -> RewardSource:
    """The reward source that a name on the command line stands for.

    Args:
        name: See `REWARD`.
        trust_remote_code: Run Python code that comes with a model.
        allow_pickle: Also accept weights that are not safetensors.
        **patience: Settings of the `Endpoint` of a reward server.

    Raises:
        InputError: There is no such reward, or it cannot be asked without further columns.
    """
    from infalign.rollouts.http import Endpoint
    from infalign.rollouts.hub import require_model
    from infalign.rollouts.rewards import FunctionReward, HTTPReward, SequenceClassificationReward

    if name.startswith(("http://", "https://")):
        return HTTPReward(Endpoint(name, **patience), name=name)
    if ":" in name and not Path(name).exists():
        if str(Path.cwd()) not in sys.path:  # it may lie where the user stands
            sys.path.insert(0, str(Path.cwd()))
        return FunctionReward(name)
    require_model(name, f"--reward {name}")
    return SequenceClassificationReward(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


@dataclass(frozen=True)
class Calibration:
    """A run's calibration, and the reward that it was made with.

    Attributes:
        reward: The reward.
        calibrator: Its quantiles, one row per prompt.
        prompts: The prompts, with the columns of their rows, in the order of the calibrator's.
        fingerprint: Of the calibrator's files.
    """

    reward: RewardSource
    calibrator: RewardCalibrator | CombinedCalibrator
    prompts: PromptSet
    fingerprint: str

    @property
    def prompt_ids(self) -> list[str]:
        """The prompts' ids."""
        return self.prompts.ids


def open_calibration(run_folder: Path, reward: RewardSource | None) -> Calibration:
    """The calibration in a run folder, for the reward given, or for the run's own.

    Raises:
        MismatchError: The reward is not the one that was calibrated.
        StorageError: The folder holds no calibrated run.
    """
    from infalign.run_folder import file_fingerprint, fingerprint
    from infalign.stages.run import open_run

    run = open_run(run_folder)
    own = run.rewards.source()
    reward = own if reward is None else reward
    scored_by = [own.key] if run.rewards.combined else run.store("reference").reward_sources
    if reward.key not in scored_by:
        raise MismatchError(
            f"the reward is {reward.key}, the calibration was made with {', '.join(scored_by)}",
            where=f"--calibration {run_folder}",
            mend="Leave --reward out to use the run's own",
        )
    files = sorted((run_folder / "calibration" / "calibrator").rglob("*.npy"))
    marks = [[str(path.relative_to(run_folder)), file_fingerprint(path)] for path in files]
    return Calibration(reward, run.calibrator(), run.prompts("train"), fingerprint(marks))
