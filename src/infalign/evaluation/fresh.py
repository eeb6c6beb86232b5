"""From rollout stores to results: what was drawn and scored of a model, beside the reference's, measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.files import write_text
from infalign._io.inventory import read_sealed, sealed
from infalign._io.progress import Progress
from infalign.errors import InputError
from infalign.evaluation.measure import measure
from infalign.evaluation.reshaped import ReshapedRecord, read_fit
from infalign.evaluation.results import MethodResult
from infalign.procedures import InferenceProcedure
from infalign.rollouts.policy import Policy
from infalign.rollouts.prompts import PromptSet
from infalign.rollouts.reshaped import TRIES, ReshapedPolicy
from infalign.rollouts.store import RolloutStore

KL_FILE = "kl.json"


def exact_kls(
    store: RolloutStore,
    prompts: PromptSet,
    num_samples: int,
    reference: str,
    load: Callable[[], tuple[Policy, Policy]],
    progress: Progress | None = None,
    ref_store: RolloutStore | None = None,
) -> NDArray[np.float64]:
    """KL of each response of a policy to the reference, (P, G) in nats, kept beside the store and computed once.

    It is exact at every visited prefix: the same expectation as the log ratios, with less noise. For a reshaped policy
    it is the log-ratios themselves.

    Args:
        store: The policy's rollouts.
        prompts: P prompts.
        num_samples: G, rollouts of each.
        reference: Fingerprint of the reference.
        load: Opens policy and reference; called only if there is something to compute.
        progress: Called after each batch.
        ref_store: The reference's rollouts, from which a reshaped policy's normalisation is estimated.
    """
    path = store.path / KL_FILE
    about = {"reference": reference, "prompt_ids": prompts.ids, "num_samples": num_samples}
    kept = read_sealed(path)  # what is damaged is computed again
    if kept is not None and {name: kept.get(name) for name in about} == about:
        return np.array(kept["exact_kl_PG"])
    policy, reference_policy = load()
    token_ids_PG = store.lists_PK("token_ids", prompts.ids, num_samples)
    ref_token_ids_PK = None
    if isinstance(policy, ReshapedPolicy) and ref_store is not None:
        ref_token_ids_PK = ref_store.lists_PK("token_ids", prompts.ids, num_samples)
    ratios = policy.log_ratios(
        reference_policy, list(prompts), token_ids_PG, ref_token_ids_PK=ref_token_ids_PK, progress=progress
    )
    content = about | {"log_ratios_PG": ratios.log_ratios_PG.tolist(), "exact_kl_PG": ratios.exact_kl_PG.tolist()}
    write_text(path, json.dumps(sealed(content)))
    return ratios.exact_kl_PG


def measure_store(
    label: str,
    store: RolloutStore,
    ref_store: RolloutStore,
    kls_PG: NDArray[np.float64],
    prompts: PromptSet,
    procedures: Sequence[InferenceProcedure],
    *,
    reward_key: str,
    reward: str,
    gold: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    series: str | None = None,
    step: int | None = None,
) -> MethodResult:
    """Measure one model from its rollouts and the reference's.

    Args:
        label: The method's name.
        store: Its rollouts, scored.
        ref_store: Fresh rollouts of the reference, scored.
        kls_PG: KL of each response, in nats; its shape says how many rollouts count.
        prompts: P prompts.
        procedures: Procedures to judge by.
        reward_key: Key, in the stores, of the reward that procedures choose by.
        reward: Its name.
        gold: Further rewards that judge: name → key in the stores.
        confidence: Level of every interval.
        series: What the results of one curve share.
        step: Training step, of a checkpoint.

    Raises:
        InputError: If a rollout was not drawn or not scored; nothing is averaged around it.
    """
    ids, num_samples = prompts.ids, kls_PG.shape[1]

    def column(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        return store.column_PK(name, ids, num_samples), ref_store.column_PK(name, ids, num_samples)

    judges: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name, key in (gold or {}).items():
        try:
            ours, theirs = (one.rewards_PK(key, ids, num_samples) for one in (store, ref_store))
        except InputError as error:
            raise InputError(error.what, where=f"gold reward {name} of {label}", hint=error.hint) from error
        judges[name] = ours, theirs
    lengths_PG, ref_lengths_PK = column("num_tokens")
    reasons_PG, ref_reasons_PK = column("finish_reason")
    texts_PG, ref_texts_PK = column("text")
    return measure(
        label,
        store.rewards_PK(reward_key, ids, num_samples),
        ref_store.rewards_PK(reward_key, ids, num_samples),
        kls_PG,
        procedures,
        reward=reward,
        judges=judges,
        lengths_PG=lengths_PG,
        ref_lengths_PK=ref_lengths_PK,
        finish_reasons_PG=reasons_PG,
        ref_finish_reasons_PK=ref_reasons_PK,
        texts_PG=texts_PG.tolist(),
        ref_texts_PK=ref_texts_PK.tolist(),
        prompt_ids=ids,
        confidence=confidence,
        series=series,
        step=step,
    )


def with_record(result: MethodResult, model: str | Path, store: RolloutStore) -> MethodResult:
    """The result with how its policy was reshaped, where `model` is a folder with the fit that it comes from.

    Args:
        result: What was measured of the policy.
        model: What `open_policy` opened.
        store: Its rollouts, with the count of what they took.
    """
    fit = read_fit(model)
    if fit is None:
        return result
    reshaping = fit.get("reshaping")
    is_mixture = isinstance(reshaping, dict) and reshaping.get("kind") == "mixture"
    acceptance, tokens = None, result.mean_length if is_mixture else None
    if (tries := read_sealed(store.path / TRIES)) is not None:
        # Of tries that were drawn ahead more than one may be accepted, and one is delivered.
        acceptance, tokens = tries["acceptance"], tries["tokens"] / (tries.get("delivered") or len(store))
    return replace(result, reshaped=ReshapedRecord.of_fit(fit, acceptance=acceptance, tokens=tokens))
