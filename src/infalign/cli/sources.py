"""What several verbs name on the command line: prompts, rewards, procedures and calibrations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infalign._io.wording import counted
from infalign.errors import InputError, MismatchError, StorageError
from infalign.procedures import InferenceProcedure, procedure_from_dict, procedure_from_name

if TYPE_CHECKING:
    from infalign._io.http import Endpoint
    from infalign.calibration.calibrator import RewardCalibrator
    from infalign.calibration.combined import CombinedCalibrator
    from infalign.rewards.source import RewardSource
    from infalign.rollouts.policy import Policy
    from infalign.rollouts.prompts import Prompt, PromptSet
    from infalign.select.candidates import CandidateSampler

REWARD = "a reward model's folder or hub name, module:function, or http(s)://…"
PROCEDURE = (
    "standard, best-of-n, worst-of-n, order-statistic, names such as best-of-4, worst-of-8 or 3-of-5, or a JSON file"
)


def told_duplicates(prompts: PromptSet, source: str | Path) -> str:
    """How many rows of a file were left out because their prompt had come before, as a sentence."""
    if prompts.duplicates == 1:
        return f"1 row of {source} repeats a prompt and is left out"
    return f"{counted(prompts.duplicates, 'row')} of {source} repeat a prompt and are left out"


def as_message(prompt: Prompt) -> Prompt:
    """A prompt that is text as a user's chat message; one that is messages already as it is."""
    content = prompt.prompt
    return replace(prompt, prompt=[{"role": "user", "content": content}]) if isinstance(content, str) else prompt


def open_named_reward(
    name: str,
    *,
    option: str = "--reward",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **patience: Any,
) -> RewardSource:
    """The reward source that a name on the command line stands for.

    Args:
        name: See `REWARD`.
        option: Where it was given, for messages.
        trust_remote_code: Run Python code that comes with a model.
        allow_pickle: Also accept weights that are not safetensors.
        **patience: Settings of the `Endpoint` of a reward server.

    Raises:
        InputError: There is no such reward, or it cannot be asked without further columns.
    """
    from infalign._io.http import Endpoint
    from infalign._io.hub import require_model
    from infalign.rewards.source import FunctionReward, HTTPReward, SequenceClassificationReward

    if name.startswith(("http://", "https://")):
        return HTTPReward(Endpoint(name, **patience), name=name)
    if ":" in name and not Path(name).exists():
        return FunctionReward(name)
    require_model(name, f"{option} {name}")
    return SequenceClassificationReward(name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)


@dataclass(frozen=True)
class Blend:
    """A second model whose candidates are mixed with those of the first.

    Attributes:
        aligned: The second model: a folder, or its name at the server.
        weight: Share of the candidates that come from it, at random; None where counts are exact.
        counts: How many of the n candidates come from the first model and from this one; None for a random share.
    """

    aligned: str
    weight: float | None = None
    counts: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, aligned: str | None, weight: float | None, count: int | None, procedure: InferenceProcedure
    ) -> Blend | None:
        """What the options `--aligned`, `--aligned-weight` and `--aligned-count` ask for.

        Raises:
            InputError: They do not go together, or the procedure does not pick one rank of n candidates, of which the
                count is a part.
        """
        if aligned is None and weight is None and count is None:
            return None
        if aligned is None or (weight is None) == (count is None):
            raise InputError("a mixture has two models, and a weight or a count", where="--aligned",
                             hint="Give --aligned and --aligned-weight or --aligned-count")  # fmt: skip
        if count is None:
            return cls(aligned, weight)
        from infalign.reshape.stratified import order_statistic  # SciPy, which --help need not wait for

        order_statistic(procedure)
        n = procedure.n or 1
        if count > n:
            raise InputError(f"{count} of {counted(n, 'candidate')}", where="--aligned-count",
                             hint="Give at most the procedure's n")  # fmt: skip
        return cls(aligned, counts=(n - count, count))

    def require_all_drawn(self, verb: str) -> None:
        """Refuse exact counts where drawing may stop early (`--stop-reward`)."""
        if self.counts is not None:
            raise InputError("exact counts are of all candidates, and --stop-reward may draw fewer", where=verb,
                             hint="Use --aligned-weight, or leave --stop-reward out")  # fmt: skip

    def policy(self, base: Any, aligned: Any) -> Any:
        """The two policies as one."""
        from infalign.rollouts.mixture import MixturePolicy
        from infalign.rollouts.split import SplitPolicy

        if self.counts is not None:
            return SplitPolicy(base, aligned, self.counts)
        assert self.weight is not None, "one of the two is given"
        return MixturePolicy(base, aligned, self.weight)


def served_sampler(
    endpoint: Endpoint, model: str, blend: Blend | None, concurrency: int, settings: Mapping[str, Any]
) -> tuple[CandidateSampler, str]:
    """What draws from a server, one model or two of its models together; and its identity for the record.

    Args:
        endpoint: The server.
        model: The model's name there; of a mixture, the base's.
        blend: The aligned model, and how much of it.
        concurrency: Requests under way at the same time.
        settings: Longest response, temperature and top_p.
    """
    from infalign.select.remote import EndpointSampler

    if blend is None:
        return EndpointSampler(endpoint, model, concurrency=concurrency, **settings), f"endpoint:{model}"
    from infalign.rollouts.endpoint import ServedPolicy
    from infalign.select.local import PolicySampler

    policy = blend.policy(*(ServedPolicy(endpoint, name, concurrency=concurrency) for name in (model, blend.aligned)))
    return PolicySampler(policy, **settings), policy.fingerprint


def open_model(model: str, blend: Blend | None, weights: Mapping[str, Any]) -> Policy:
    """A policy of this machine, or two together, one base in memory where adapters share it.

    Args:
        model: Folder, adapter, hub name, or folder of a policy.
        blend: A second one, and how much of it.
        weights: Which kinds of weights are accepted (`trust_remote_code`, `allow_pickle`).
    """
    from infalign.rollouts.opening import open_policies, open_policy

    if blend is None:
        return open_policy(model, **weights)
    return blend.policy(*open_policies([model, blend.aligned], **weights))


def parse_procedure(text: str, n: int | None = None, k: int | None = None) -> InferenceProcedure:
    """A procedure from the command line.

    Args:
        text: standard, best-of-n, worst-of-n, order-statistic (with n and k), best-of-4, worst-of-8, 3-of-5, or the
            path of a JSON file that `InferenceProcedure.to_dict` describes (mixtures and fitted procedures).
        n: Responses drawn, where the name leaves it open.
        k: Rank from the worst, for order-statistic.

    Raises:
        InputError: If the name is unknown, a number is missing or superfluous, or the file does not fit.
        StorageError: If the file cannot be read.
    """
    name = text.strip().lower()
    if name in ("best-of-n", "worst-of-n", "order-statistic"):
        if n is None:
            raise InputError(f"{name} needs the number of responses", where="procedure", hint="Add --n, such as --n 4")
        if name == "order-statistic" and k is None:
            raise InputError("order-statistic needs --k", where="procedure", hint="Add --k, such as --k 3")
        if name != "order-statistic" and k is not None:
            raise InputError(f"--k does not go with {name}", where="procedure", hint="Leave it out")
        return procedure_from_dict({"kind": name, "n": n, **({} if k is None else {"k": k})})
    if n is not None or k is not None:
        raise InputError(f"--n and --k do not go with {text!r}", where="procedure", hint="Leave them out")
    named = procedure_from_name(name)
    if named is not None:
        return named
    path = Path(text)
    if path.suffix == ".json":
        try:
            description: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"cannot read the procedure ({error.strerror})", where=str(path)) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a JSON file ({error})", where=str(path)) from error
        if isinstance(description, dict) and description.get("format") == "infalign.transform":
            raise InputError("this is a transform, not a procedure", where=str(path), hint="Use it in a recipe")
        try:
            return procedure_from_dict(description)
        except InputError as error:
            raise InputError(f"{error.where}: {error.what}", where=str(path), hint=error.hint) from error
    raise InputError(f"unknown procedure {text!r}", where="procedure", hint=f"Use one of {PROCEDURE}")


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


def open_calibration(
    run_folder: Path, reward: RewardSource | None, *, trust_run: bool, trust_remote_code: bool, allow_pickle: bool
) -> Calibration:
    """The calibration in a run folder, for the reward given, or for the run's own.

    Args:
        run_folder: The folder.
        reward: What the user named; the run's own rewards are then not opened.
        trust_run: Import the functions and ask the servers that the run names as rewards.
        trust_remote_code: Run Python code that comes with its models.
        allow_pickle: Also accept weights that are not safetensors.

    Raises:
        MismatchError: The reward is not the one that was calibrated.
        StorageError: The folder holds no calibrated run.
        InputError: The run's recipe would do what it is not allowed.
    """
    from infalign.run.folder import file_fingerprint, fingerprint
    from infalign.run.stages.run import open_run
    from infalign.run.stages.trust import Trust

    trust = Trust(remote_code=trust_remote_code, pickle=allow_pickle, rewards=trust_run)
    run = open_run(run_folder, trust, rewards=reward is None)
    combined = len(run.recipe.reward) > 1
    if reward is not None and combined:
        raise MismatchError("the calibration was made with several rewards together",
                            where=f"--calibration {run_folder}",
                            hint="Leave --reward out to use the run's own")  # fmt: skip
    own = run.recipe.reward[0].function or run.recipe.reward[0].name or run.recipe.reward[0].model
    changed = reward is None or str(reward) == own
    reward = run.rewards.source() if reward is None else reward
    prompts = run.prompts("train")
    reward.render_at(prompts[0].rendered_at)
    if not combined and reward.key not in run.store("reference").reward_sources:
        raise MismatchError(
            f"the reward {reward} has changed since the calibration was made"
            if changed
            else f"the reward is {reward}, the calibration was made with {own or 'the testbed reward'}",
            where=f"--calibration {run_folder}",
            hint="Do `infalign calibrate` again with the changed reward"
            if changed
            else "Leave --reward out to use the run's own",
        )
    files = sorted((run_folder / "calibration" / "calibrator").rglob("*.npy"))
    marks = [[str(path.relative_to(run_folder)), file_fingerprint(path)] for path in files]
    return Calibration(reward, run.calibrator(), prompts, fingerprint(marks))
