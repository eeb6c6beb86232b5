"""`infalign reshape RUN`: reshape a finished run's model for any procedure and budget, after the fact."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infalign._io.files import write_json
from infalign._io.progress import Progress
from infalign.errors import InputError
from infalign.procedures import InferenceProcedure
from infalign.reshape import Goal, Reshaping, Split, best_split
from infalign.reshape.histogram import log_ratio_histogram
from infalign.run.folder import RunFolder
from infalign.run.stages.distil import Distillation, distil, measure_distilled
from infalign.run.stages.reshape import FILE, KINDS, choose, reshaping_data, write_policy
from infalign.run.stages.run import Run, open_run
from infalign.run.stages.trust import Trust

_SPLITS_SHOWN = 5


class Reporter(Protocol):
    """Tells the user what is going on."""

    def say(self, text: str) -> None:
        """One plain line."""
        ...

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """A stage in progress."""
        ...


@dataclass(frozen=True)
class ReshapeRequest:
    """What to fit to a finished run.

    Attributes:
        method: Name of the aligned model; the run's first if None.
        procedure: How the policy will be used; the run's own procedure if None.
        kl_budget: In nats; the run's own if None.
        kinds: Kinds of reshaping to fit.
        num_samples: Rollouts of the aligned model per calibration prompt.
        split: Also say how to split the candidates of the procedure between the two models.
        out: Folder of the policy; one in the run folder if None.
        distil: Also train one model on samples of the policy, in this way.
        trust: What the run's recipe is allowed; nothing by default.
    """

    method: str | None = None
    procedure: InferenceProcedure | None = None
    kl_budget: float | None = None
    kinds: Sequence[str] = KINDS
    num_samples: int = 32
    split: bool = False
    out: Path | None = None
    distil: Distillation | None = None
    trust: Trust | None = None


def reshape_run(folder: Path, request: ReshapeRequest, reporter: Reporter) -> dict[str, Any]:
    """Fit a reshaping of a finished run's model for any procedure and budget, and write its policy.

    Args:
        folder: The run folder.
        request: What to fit.
        reporter: Told what is going on.

    Returns:
        `text` for a person; the fit, and the policy's folder, for a program.

    Raises:
        InputError: If there is no such model, or the run kept no prompts aside to fit on.
        StorageError: If the folder holds no calibrated run, or cannot be written.
    """
    run = open_run(folder, request.trust)
    planned = {one.name: one for one in run.planned()}
    name = request.method or next(iter(planned))
    if name not in planned or not run.policy_folder(name).is_dir():
        trained = [one for one in planned if run.policy_folder(one).is_dir()]
        raise InputError(
            f"the run has no aligned model {name!r}",
            where=str(folder),
            hint=f"There are: {', '.join(trained)}" if trained else "Train one first: infalign train RECIPE",
        )
    prompts = run.kept_prompts()
    if len(prompts) < 2:
        raise InputError(
            "the run kept no training prompts aside to fit a reshaping on",
            where=str(folder),
            hint="Make the run with kl_budget, or with reshape: auto",
        )
    procedure = request.procedure or run.recipe.target_procedure
    kl_budget = request.kl_budget or float(run.read_json("plan.json")["kl"])
    with RunFolder(folder, run.recipe.name).writing():
        with reporter.stage(f"Rollouts and log-ratios ({name})") as progress:
            data = reshaping_data(run, name, prompts, request.num_samples, progress)
        with reporter.stage(f"Fit for {procedure.label} at {kl_budget:g} nats"):
            goal = Goal(procedure, kl_budget=kl_budget)
            report = [one for one in run.recipe.evaluation_procedures if one != procedure]
            choice = choose(data, goal, request.kinds, report, alone=planned[name].mixture_weight == 1.0)
    lines = [choice.reason, *_predicted_lines(choice.reshaping)]
    about = {"method": name, "trained_weight": planned[name].trained_weight, "prompts": len(prompts)}
    content: dict[str, Any] = {**about, "kl_budget": kl_budget, **choice.to_dict()}
    if request.split:
        splits = best_split(data, procedure, kl_budget=kl_budget)
        lines += _split_lines(splits)
        content["splits"] = [_split_dict(one) for one in splits[:_SPLITS_SHOWN]]
    where = run.policy_folder(name)
    if choice.chosen or len(request.kinds) == 1:  # whoever names a kind gets it
        where = request.out or folder / "reshaped" / f"{name}-{procedure.label.lower()}-{kl_budget:g}"
        write_policy(where, run.reference, run.policy_folder(name), choice.reshaping)
        write_json(where / FILE, {**content, "histogram": log_ratio_histogram(data)})
    if request.distil is not None:
        if where == run.policy_folder(name):
            raise InputError("the model alone is best, and it is one model already", where="--distil",
                             hint="Leave --distil out, or name a --kind")  # fmt: skip
        content["distilled"] = _distil(run, where, request, procedure, reporter, lines)
    lines.append(f"Policy: {where} (a model for infalign evaluate, decode, serve and audit)")
    return {"text": "\n".join(lines), **content, "policy": str(where)}


def _distil(
    run: Run,
    where: Path,
    request: ReshapeRequest,
    procedure: InferenceProcedure,
    reporter: Reporter,
    lines: list[str],
) -> dict[str, Any]:
    """Train one model on samples of the policy, and say what it measures."""
    assert request.distil is not None, "the caller checked"
    with RunFolder(run.out, run.recipe.name).writing():
        with reporter.stage("Distil into one model") as progress:
            model = distil(run, where, request.distil, progress)
        with reporter.stage("Measure the distilled model") as progress:
            measured = measure_distilled(run, model, procedure, request.num_samples, progress)
    rate = measured.win_rates[procedure.label]
    told = f"{procedure.label} {100 * rate.estimate:.1f} ± {100 * rate.standard_error:.1f} %"
    told += f" at {measured.kl.estimate:.3f} ± {measured.kl.standard_error:.3f} nats"
    lines.append(f"Distilled into one model: {told}, measured on the prompts kept aside: {model}")
    return {"model": str(model), "measured": measured.to_dict()}


def _predicted_lines(reshaping: Reshaping) -> list[str]:
    predicted = reshaping.predictions
    assert predicted is not None, "a fit predicts"
    rates = ", ".join(
        f"{label} {100 * rate.estimate:.1f} ± {100 * rate.standard_error:.1f} %"
        for label, rate in predicted.win_rates.items()
    )
    kl = f"KL {predicted.kl.estimate:.3f} ± {predicted.kl.standard_error:.3f} nats"
    lines = [f"Predicted on new prompts: {kl}; {rates}"]
    if predicted.tokens is not None:
        cost = f"{predicted.tries.estimate:.2f} tries and {predicted.tokens.estimate:.1f} tokens per delivered response"
        lines.append(f"Cost: {cost}")
    return lines


def _split_dict(split: Split) -> dict[str, Any]:
    found = {"win_rate": split.win_rate, "kl": split.kl}
    numbers = {
        name: {"estimate": one.estimate, "standard_error": one.standard_error, "interval": one.confidence_interval}
        for name, one in found.items()
    }
    return {"counts": list(split.procedure.counts), **numbers}


def _split_lines(splits: Sequence[Split]) -> list[str]:
    lines = ["Exact counts (candidates from the reference + from the model), best first:"]
    for one in splits[:_SPLITS_SHOWN]:
        counts = " + ".join(map(str, one.procedure.counts))
        rate = f"{100 * one.win_rate.estimate:.1f} ± {100 * one.win_rate.standard_error:.1f} %"
        lines.append(f"  {counts}: {rate} at {one.kl.estimate:.3f} nats a candidate")
    return lines
