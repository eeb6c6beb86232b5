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

from infalign.evaluation.results import Measured, MethodResult
from infalign.evaluation.tied_limit import tie_notes
from infalign.run_folder import write_text
from infalign.training.landing import Landing
from infalign.wording import counted

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


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


def model_card(facts: CardFacts) -> ModelCard:
    """The card, with the metadata that the Hugging Face Hub reads in its head."""
    base = facts.base if _HUB_NAME.fullmatch(facts.base) and not Path(facts.base).exists() else None
    head = ModelCardData(
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        tags=["infalign", "rlhf", "inference-time-alignment"],
    )
    landed = ""
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

Trained from {plain(facts.base)} to win when it is used through **{plain(facts.procedure)}**: for the inference-time
win rate over the reference model (InfAlign, [arXiv 2412.19792](https://arxiv.org/abs/2412.19792)). Used otherwise it
may do worse than a model trained for that use.

## Training

| | |
|---|---|
| Procedure | {plain(facts.procedure)} |
| Reward transform Φ | {plain(facts.transform)} |
| β at the end of training | {facts.beta:.4g} (units of Φ per nat) |
| Planned KL | {facts.planned_kl:.3g} nats |
{landed}| Steps | {facts.steps} of {counted(facts.rollouts_per_step, "rollout")} of at most {longest} |
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

{_measured(facts.result)}

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


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; of a path only its last part."""
    text = " ".join(str(text).split())
    path = Path(text)
    windows = PureWindowsPath(text)
    if path.is_absolute() or text.startswith((".", "~")) or path.exists():
        text = path.name
    elif windows.drive:
        text = windows.name
    return _SPECIAL.sub(r"\\\1", html.escape(text, quote=False)) or "(no name)"


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
