"""What a sceptic asks of a mixture or a reshaped policy, from the responses that an evaluation has already drawn.

    infalign run recipes/docstrings_best_of_16.yaml --set seed=0 --out runs/d0
    python benchmarks/reshape_sceptic.py runs/d0 [--procedure best-of-16]

For every policy of the run's evaluation, on its held-out prompts:

- `worth N`: with how many candidates the reference alone would win as often, N' = N W / (1 − W) (for Best-of-N with a
  continuous reward, W = N' / (N' + N); likewise for Worst-of-N, N' = N (1 − W) / W), and the tokens that they would
  cost beside the policy's own.
- `delivered`: KL in nats of what is *delivered*, not of one sample: E[log(π/p) of the chosen answer] +
  log N − (N − 1)/N. The first part is unbiased (selection weights, M10), the second is that of the choice itself
  for a continuous reward. For the reference it is all there is.
- `tokens`, `variety`: length in tokens of one response and of the delivered one; distinct texts among N candidates, as
  a share, and distinct word pairs among all word pairs of N candidates.
- `standard`: win rate of a user who takes one sample.

One row for each policy, as JSON lines, then a table.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from infalign.estimators import mean_estimate, win_rates
from infalign.procedures import BestOfN, InferenceProcedure, Standard, WorstOfN, procedure_from_name
from infalign.run.stages.run import Run, open_run


def delivered(values_PG: Any, rewards_PG: Any, procedure: InferenceProcedure) -> Any:
    """Mean of a value over what the procedure delivers, for each prompt: every choice of n of the G samples counts."""
    weights_G = procedure.selection_weights(rewards_PG.shape[1])
    out_P = np.empty(len(rewards_PG))
    for p, (values_G, rewards_G) in enumerate(zip(values_PG, rewards_PG, strict=True)):
        # Samples of one reward share the weights of their ranks.
        _, level_G = np.unique(rewards_G, return_inverse=True)
        order_G = np.argsort(rewards_G, kind="stable")
        weight_of_level = np.bincount(level_G[order_G], weights=weights_G)
        out_P[p] = (weight_of_level / np.bincount(level_G))[level_G] @ values_G
    return out_P


def variety(texts_PG: Any, n: int) -> tuple[float, float]:
    """Share of distinct texts, and of distinct word pairs, in groups of n candidates."""
    texts, pairs = [], []
    for texts_G in texts_PG:
        for start in range(0, len(texts_G) - n + 1, n):
            group = [str(text) for text in texts_G[start : start + n]]
            texts.append(len(set(group)) / n)
            found = [pair for text in group for words in [text.split()] for pair in pairwise(words)]
            pairs.append(len(set(found)) / max(len(found), 1))
    return float(np.mean(texts)), float(np.mean(pairs))


def answers(run: Run, name: str, procedure: InferenceProcedure) -> dict[str, Any]:
    """The row of one policy."""
    prompts, count = run.prompts("evaluation"), run.recipe.evaluation.num_samples
    ref_store, store = run.store("evaluation-reference"), run.store(f"evaluation-{name}")
    ref_rewards_PK = run.rewards.read_PKM(ref_store, prompts.ids, count)[..., 0]
    rewards_PG = run.rewards.read_PKM(store, prompts.ids, count)[..., 0]
    lengths_PG = np.asarray(store.column_PK("num_tokens", prompts.ids, count), dtype=float)
    ref_lengths_PK = np.asarray(ref_store.column_PK("num_tokens", prompts.ids, count), dtype=float)
    n = procedure.n or 1
    own, standard = win_rates(rewards_PG, ref_rewards_PK, [procedure, Standard()])
    share = own.estimate / (1 - own.estimate)
    worth = n * (share if isinstance(procedure, BestOfN) else 1 / share)
    chosen = math.log(n) - (n - 1) / n
    if name == "reference":
        kl_P = delivered_P = np.zeros(len(prompts))
    else:
        kls = json.loads((store.path / "kl.json").read_text())
        log_ratios_PG = np.array(kls["log_ratios_PG"])
        kl_P, delivered_P = np.array(kls["exact_kl_PG"]).mean(axis=1), delivered(log_ratios_PG, rewards_PG, procedure)
    texts, pairs = variety(store.column_PK("text", prompts.ids, count), n)
    kl, far = mean_estimate(kl_P), mean_estimate(delivered_P)
    return {
        "policy": name,
        "win_rate": own.estimate,
        "error": own.standard_error,
        "standard": standard.estimate,
        "kl": kl.estimate,
        "worth_n": worth,
        "worth_tokens": worth * ref_lengths_PK.mean() / (n * lengths_PG.mean()),
        "delivered_kl": far.estimate + chosen,
        "delivered_error": far.standard_error,
        "tokens": float(lengths_PG.mean()),
        "delivered_tokens": float(delivered(lengths_PG, rewards_PG, procedure).mean()),
        "distinct_texts": texts,
        "distinct_pairs": pairs,
    }


def main() -> None:
    """Answer for every policy of the run."""
    parser = argparse.ArgumentParser(description="Questions of a sceptic, answered from a finished run's evaluation.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--procedure", default="best-of-16")
    options = parser.parse_args()
    run, procedure = open_run(options.run), procedure_from_name(options.procedure)
    if not isinstance(procedure, BestOfN | WorstOfN):
        parser.error("give best-of-N or worst-of-N")
    rows = [answers(run, name, procedure) for name in ("reference", *(one.name for one in run.evaluated()))]
    table = Table(title=f"{options.run.name}: {procedure.label}")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "policy" else "right")
    for row in rows:
        print(json.dumps(row))
        table.add_row(*(value if isinstance(value, str) else f"{value:.3f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
