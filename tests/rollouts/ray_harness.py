"""Draw on a local Ray cluster of two workers, one of them killed half-way; run by test_cluster.py in its own process.

Arguments: model folder, output folder. Prints one JSON line; exits with 77 where Ray cannot start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", TQDM_DISABLE="1")

import psutil
import ray
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign.rollouts.cluster import sample_on_cluster
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore

PROMPTS = [Prompt(f"prompt number {i}") for i in range(40)]
NUM_SAMPLES, EARLIER = 30, 5
TOTAL = len(PROMPTS) * NUM_SAMPLES


class Killer:
    """Kills one worker when half of the rollouts are there."""

    def __init__(self) -> None:
        self.reports, self.workers, self.killed_at = 0, [], None

    def __call__(self, done: int, total: int, text: str) -> None:
        self.reports += 1
        if self.killed_at is None and done >= total / 2:
            running = psutil.Process().children(recursive=True)
            workers = [process for process in running if "MapWorker" in " ".join(process.cmdline())]
            workers[0].send_signal(signal.SIGKILL)
            self.workers, self.killed_at = [process.pid for process in workers], done


def main() -> None:
    """Draw, kill, compare with one process."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    settings = {"max_new_tokens": 12, "seed": 3}
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, number in (("alone", NUM_SAMPLES), ("shared", EARLIER)):
        sample(model, tokenizer, PROMPTS, number, store=out / name, model_name=folder, **settings)
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        print(f"Ray cannot start: {error}", file=sys.stderr)
        sys.exit(77)
    killer = Killer()
    arguments = {"store": out / "shared", "batch_size": 50, **settings}
    drawn = sample_on_cluster(folder, PROMPTS, NUM_SAMPLES, progress=killer, **arguments)
    again = sample_on_cluster(folder, PROMPTS, NUM_SAMPLES, **arguments)
    ray.shutdown()
    alone, shared = RolloutStore.read(out / "alone"), RolloutStore.read(out / "shared")
    ids = [prompt.id for prompt in PROMPTS]
    same = all(
        alone.lists_PK(column, ids, NUM_SAMPLES) == shared.lists_PK(column, ids, NUM_SAMPLES)
        for column in ("text", "token_ids", "finish_reason")
    )
    difference = abs(alone.column_PK("logprob", ids, NUM_SAMPLES) - shared.column_PK("logprob", ids, NUM_SAMPLES))
    found = {
        "workers": len(killer.workers),
        "killed at": killer.killed_at,
        "drawn": drawn,
        "again": again,
        "rows": len(shared),
        "same": same,
        "largest difference of log-probabilities": float(difference.max()),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
