"""The model card of an aligned model: what it was trained for, how, from what, and what was measured.

A card travels further than a run folder: it names models, rewards and prompts, and never says where they lay.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from huggingface_hub import ModelCard, ModelCardData

from infalign._io.files import write_text
from infalign._io.wording import counted, visible
from infalign.evaluation.reshaped import ReshapedRecord
from infalign.evaluation.results import Measured, MethodResult
from infalign.evaluation.tied_limit import tie_notes
from infalign.report.reshaped import prediction_rows, with_error
from infalign.training.landing import Landing

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OF_N = re.compile(r"(?:Best|Worst)-of-\d+")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


@dataclass(frozen=True)
class ReshapedFacts:
    """What a card states of the mixture or reshaped policy that an aligned model is a part of.

    Attributes:
        name: What it is called.
        record: How it was made and what was predicted of it.
        num_prompts: Prompts that it was fitted on, which no update has seen.
        result: What was measured; None before the evaluation.
    """

    name: str
    record: ReshapedRecord
    num_prompts: int
    result: MethodResult | None = None


@dataclass(frozen=True)
class CardFacts:
    """What a model card states. Names may be paths; the card shows their last part.

    Attributes:
        name: The run's name.
        base: The reference policy: folder or hub name.
        procedure: Label of the procedure that the model is for, such as "Best-of-4".
        transform: Name of the reward transform.
        beta: KL coefficient at the end of training, in units of Φ per nat.
        planned_kl: KL that theory was asked for, in nats.
        kl_budget: KL to end at, in nats; None where β was fixed.
        landing: How the budget was met.
        steps: Optimiser steps.
        rollouts_per_step: Rollouts of one step.
        max_new_tokens: Cap on a response.
        adapter: Whether an adapter was trained instead of all weights.
        rewards: Reward models or functions.
        reward_key: What the rewards are stored under.
        num_ref: K, reference rollouts per prompt.
        ties: Tie rule of the calibration.
        tie_mass: Chance that two references of a prompt tie.
        prompts: Where the prompts came from.
        num_train: Training prompts.
        num_evaluation: Prompts kept for evaluation.
        seed: The run's seed.
        versions: Package versions.
        result: What was measured; None before the evaluation.
        trained_weight: The model's share of the mixture that it was trained inside; None where it is to be used alone.
        reshaped: Its mixture or reshaped policy; None where there is none.
    """

    name: str
    base: str
    procedure: str
    transform: str
    beta: float
    planned_kl: float
    kl_budget: float | None
    landing: Landing | None
    steps: int
    rollouts_per_step: int
    max_new_tokens: int
    adapter: bool
    rewards: tuple[str, ...]
    reward_key: str
    num_ref: int
    ties: str
    tie_mass: float
    prompts: str
    num_train: int
    num_evaluation: int
    seed: int
    versions: Mapping[str, str]
    result: MethodResult | None = None
    trained_weight: float | None = None
    reshaped: ReshapedFacts | None = None


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with the metadata that the Hugging Face Hub reads in its head."""
    head = _head(facts, "peft" if facts.adapter else "transformers")
    landed, inside = "", ""
    if facts.trained_weight is not None:
        inside = f"| Trained inside a mixture | {facts.trained_weight:.1%} of it; the reference is the rest |\n"
    if facts.kl_budget is not None:
        landed = f"| KL budget | {facts.kl_budget:g} nats |\n"
        if facts.landing is not None:
            one = facts.landing
            landed += (
                f"| KL at the end of training | {one.kl:.3f} ± {one.standard_error:.3f} nats on prompts kept out of "
                f"the updates, with the update scaled by {one.scale:.2f} |\n"
            )
    rewards, longest = ", ".join(plain(name) for name in facts.rewards), counted(facts.max_new_tokens, "token")
    body = f"""# {plain(facts.name)}: {plain(facts.transform)}

{_purpose(facts)}

## Training

| | |
|---|---|
| Procedure | {plain(facts.procedure)} |
| Reward transform Φ | {plain(facts.transform)} |
| β at the end of training | {facts.beta:.4g} (units of Φ per nat) |
| Planned KL | {facts.planned_kl:.3g} nats |
{inside}{landed}| Steps | {facts.steps} of {counted(facts.rollouts_per_step, "rollout")} of at most {longest} |
| Weights | {"an adapter (PEFT)" if facts.adapter else "all"} |
| Seed | {facts.seed} |

## Calibration

| | |
|---|---|
| Reward | {rewards} ({plain(facts.reward_key)}) |
| Reference rollouts per prompt | {facts.num_ref} |
| Tie rule | {plain(facts.ties)} |
| Tie mass among the references | {facts.tie_mass:.4f} |

## Data

| | |
|---|---|
| Prompts | {plain(facts.prompts)} |
| Training prompts | {facts.num_train} |
| Evaluation prompts, held out | {facts.num_evaluation} |

## Measured

{_not_alone(facts) if facts.trained_weight is not None and facts.result is None else _measured(facts.result)}
{_reshaped_section(facts)}
## Versions

{", ".join(f"{plain(name)} {plain(version)}" for name, version in facts.versions.items())}
"""
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}")


def write_model_card(folder: Path, facts: CardFacts) -> None:
    """Write the card as the folder's `README.md`, in place of any other.

    Raises:
        StorageError: If it cannot be written.
    """
    write_text(folder / "README.md", model_card(facts).content)


def reshaped_card(facts: CardFacts, reshaped: ReshapedFacts) -> ModelCard:
    """The card of a mixture or reshaped policy.

    Args:
        facts: Of its aligned model.
        reshaped: Of the policy itself.
    """
    record = reshaped.record
    made = (
        f"A mixture for use through **{plain(record.procedure)}**: each response is drawn from the aligned model with "
        f"probability {record.weight:.4g}, otherwise from {plain(facts.base)}."
        if record.is_mixture
        else f"Responses of {plain(facts.base)}, reweighted for use through **{plain(record.procedure)}** by how much "
        f"more the aligned model likes them. They are drawn exactly, by rejection."
    )
    body = f"""# {plain(facts.name)}: {plain(reshaped.name)}

{made} The aligned model is in `../model`; its card says how it was trained.
`policy.json` names both models: move them together with this folder, or say there where they are.

{_how_to_use(facts, reshaped, "##", ".")}

## Predicted and measured

{_predicted(reshaped)}

## Versions

{", ".join(f"{plain(name)} {plain(version)}" for name, version in facts.versions.items())}
"""
    return ModelCard(f"---\n{_head(facts, 'infalign').to_yaml()}\n---\n\n{body}")


def write_reshaped_card(folder: Path, facts: CardFacts) -> None:
    """Write the card of the reshaped policy as its folder's `README.md`, in place of any other.

    Raises:
        StorageError: If it cannot be written.
    """
    assert facts.reshaped is not None, "there is something to write about"
    write_text(folder / "README.md", reshaped_card(facts, facts.reshaped).content)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; of a path only its last part."""
    text = " ".join(str(text).split())
    path = Path(text)
    windows = PureWindowsPath(text)
    if path.is_absolute() or text.startswith((".", "~")) or path.exists():
        text = path.name
    elif windows.drive:
        text = windows.name
    return _SPECIAL.sub(r"\\\1", html.escape(visible(text), quote=False)) or "(no name)"


def _head(facts: CardFacts, library: str) -> ModelCardData:
    base = facts.base if _HUB_NAME.fullmatch(facts.base) and not Path(facts.base).exists() else None
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base,
        tags=["infalign", "rlhf", "inference-time-alignment"],
    )


def _purpose(facts: CardFacts) -> str:
    paper = "(InfAlign, [arXiv 2412.19792](https://arxiv.org/abs/2412.19792))"
    if facts.trained_weight is None:
        return (
            f"Trained from {plain(facts.base)} to win when it is used through **{plain(facts.procedure)}**: for the "
            f"inference-time\nwin rate over the reference model {paper}. Used otherwise it\n"
            "may do worse than a model trained for that use."
        )
    return (
        f"Trained from {plain(facts.base)} as one part of a mixture that wins when it is used through "
        f"**{plain(facts.procedure)}** {paper}.\n\n**Not meant to be used alone.** {_alone(facts)}"
    )


def _alone(facts: CardFacts) -> str:
    """How far the aligned model alone is from the reference."""
    known = None if facts.reshaped is None else facts.reshaped.record.alone_kl
    if known is None:
        return "Alone it is much further from the reference than the mixture."
    return (
        f"Alone its KL from the reference is {with_error(known.estimate, known.standard_error, 1, 3)} nats, estimated "
        "on prompts kept out of the updates."
    )


def _not_alone(facts: CardFacts) -> str:
    there = "below" if facts.reshaped is not None else "once it is made"
    return f"The model is not evaluated alone; the policy that it is a part of is, {there}."


def _reshaped_section(facts: CardFacts) -> str:
    """The aligned model's part in a mixture or a reshaped policy, as a section; empty where there is none."""
    reshaped = facts.reshaped
    if reshaped is None:
        return ""
    record = reshaped.record
    kind = "Mixture" if record.is_mixture else "Reshaped policy"
    told = (
        f"draws each response from this model with probability {record.weight:.4g}, otherwise from {plain(facts.base)}."
        if record.is_mixture
        else f"reweights the responses of {plain(facts.base)} by this model's log-ratio, and draws them by rejection."
    )
    return f"""
## {kind} for {plain(record.procedure)}

The policy in `../reshaped` {told}

{_how_to_use(facts, reshaped, "###", "../reshaped")}

### Predicted and measured

{_predicted(reshaped)}
"""


def _how_to_use(facts: CardFacts, reshaped: ReshapedFacts, level: str, folder: str) -> str:
    """Code, commands and the caution that come with a reshaped policy; names of models stay out of the code."""
    record = reshaped.record
    n = record.procedure.rpartition("-")[2] if _OF_N.fullmatch(record.procedure) else "16"
    procedure = record.procedure.lower() if _OF_N.fullmatch(record.procedure) else "PROCEDURE"
    text = f"""{level} Use

```python
import infalign as ia
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore

policy = ia.open_policy("{folder}")
store = RolloutStore.open("rollouts", policy.key(max_new_tokens={facts.max_new_tokens}, seed=0))
policy.draw([Prompt("A prompt")], {n}, store=store)
```

or through the procedure, with the reward that chooses:

    infalign decode "A prompt" --model {folder} --reward REWARD --procedure {procedure}
    infalign serve --model {folder} --reward REWARD --procedure {procedure}
"""
    if record.is_mixture:
        # The way of vLLM; docs/rollouts.md says what it was tested with.
        server = (
            "    vllm serve BASE --enable-lora --lora-modules aligned=ADAPTER --port 8001\n" if facts.adapter else ""
        )
        text += f"""
On a server it needs two model names and no more, the base's and the aligned model's:

{server}    infalign serve --upstream http://127.0.0.1:8001/v1 --model-name BASE --aligned aligned \\
        --aligned-weight {record.weight:.4g} --reward REWARD --procedure {procedure}

Without infalign: send the request for each candidate to the aligned model with probability {record.weight:.4g},
independently of the others, else to the base.
"""
    return f"{text}\n{_single_sample(reshaped)}"


def _single_sample(reshaped: ReshapedFacts) -> str:
    """The caution for whoever takes one sample."""
    record = reshaped.record
    if record.procedure == "Standard":
        return ""
    told = ""
    if (rate := record.predictions.win_rates.get("Standard")) is not None:
        told = f" Its standard win rate is predicted to be {with_error(rate.estimate, rate.standard_error, 100, 1)} %"
        measured = () if reshaped.result is None else reshaped.result.procedures
        found = next((entry.win_rate for entry in measured if entry.procedure == "Standard"), None)
        told += "." if found is None else f" and was measured as {_interval(found, 100, 1)} %."
    why = f" {1 - record.weight:.0%} of its samples are the reference's own." if record.is_mixture else ""
    return (
        f"**A single sample.** It was made for {plain(record.procedure)}, not for one sample.{told}{why} Whoever takes "
        "single samples should take a model that was aligned for them."
    )


def _predicted(reshaped: ReshapedFacts) -> str:
    record, predictions = reshaped.record, reshaped.record.predictions
    if reshaped.result is not None:
        rows = [(one.quantity, one.predicted, one.measured) for one in prediction_rows([reshaped.result])]
    else:
        kl = predictions.kl
        rows = [("KL, nats", with_error(kl.estimate, kl.standard_error, 1, 3), "not yet")]
        rows += [
            (f"{label} win rate, %", with_error(rate.estimate, rate.standard_error, 100, 1), "not yet")
            for label, rate in predictions.win_rates.items()
        ]
    if not record.is_mixture:
        found = "not yet" if record.acceptance is None else f"{100 * record.acceptance:.1f}"
        rows.append(("proposals accepted, %", f"{100 * predictions.acceptance.estimate:.1f}", found))
    if predictions.tokens is not None:
        found = "not yet" if record.tokens is None else f"{record.tokens:.1f}"
        rows.append(("tokens per response, rejected ones included", f"{predictions.tokens.estimate:.1f}", found))
    table = "\n".join(f"| {plain(name)} | {predicted} | {found} |" for name, predicted, found in rows)
    return (
        f"Predicted at the fit, on {counted(reshaped.num_prompts, 'prompt')} that no update has seen, each by a fit to "
        "others; measured on other prompts. ± is one standard error.\n\n"
        f"| | predicted | measured |\n|---|---|---|\n{table}"
    )


def _measured(result: MethodResult | None) -> str:
    if result is None:
        return "Not yet."
    rows = "\n".join(
        f"| {plain(entry.procedure)} | {_interval(entry.win_rate, 100, 1)} % | "
        f"{'' if entry.limit is None or not result.moved else f'{100 * entry.limit:.1f} %'} |"
        for entry in result.procedures
    )
    notes = " ".join(tie_notes([result], [entry.procedure for entry in result.procedures]))
    return (
        f"On {counted(result.num_prompts, 'held-out prompt')}, {counted(result.num_samples, 'fresh response')} "
        f"each, judged by "
        f"{plain(result.reward)}; {100 * result.confidence:g} % intervals, prompts being the independent unit.\n\n"
        f"Sequence-level KL from the reference: {_interval(result.kl, 1, 3)} nats"
        f"{'' if result.moved else ': it has hardly moved, if at all'}.\n\n"
        "| used as | win rate over the reference used the same way | limit at this KL |\n|---|---|---|\n"
        + rows
        + (f"\n\n{plain(notes)}" if notes else "")
    )


def _interval(measured: Measured, factor: float, digits: int) -> str:
    value = f"{factor * measured.estimate:.{digits}f}"
    if measured.low is None or measured.high is None:
        return value
    return f"{value} ({factor * measured.low:.{digits}f} to {factor * measured.high:.{digits}f})"
