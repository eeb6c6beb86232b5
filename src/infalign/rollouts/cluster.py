"""Draw rollouts on a Ray cluster: workers that each hold a model, and one driver that writes to the store."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
from transformers import AutoConfig

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.errors import InfalignError, InputError
from infalign.rollouts.batches import ROWS_ON_CPU, Missing, draw_batch, missing_rollouts, require_fit, take_batch
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_policy, load_tokenizer
from infalign.rollouts.moved import adapter_base
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import ROLLOUT_SCHEMA, RolloutStore
from infalign.rollouts.tokens import end_tokens, prompt_token_ids


class ClusterError(InfalignError):
    """The cluster could not do the work."""


def sample_on_cluster(
    model: str | Path,
    prompts: Sequence[Prompt],
    num_samples: int,
    *,
    store: str | Path,
    max_new_tokens: int,
    seed: int,
    num_workers: int = 2,
    cpus_per_worker: float = 0.5,
    gpus_per_worker: float = 0.0,
    batch_size: int = ROWS_ON_CPU,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> int:
    """Draw rollouts 0..num_samples−1 of every prompt on a Ray cluster, as far as the store does not have them.

    The rollouts, and the store's key, are those of `sample`, up to rounding: what one began the other can finish. A
    worker that dies is replaced, and its batch drawn again. Only the driver writes; if it dies, what has not been
    written is drawn at the next start.

    Args:
        model: Model folder that every worker can read at this path, or a hub name.
        prompts: Text is tokenised as it is, messages go through the chat template.
        num_samples: Rollouts per prompt.
        store: Folder of the store.
        max_new_tokens: Longest response.
        seed: Seed of the sampling.
        num_workers: Processes that each hold a model.
        cpus_per_worker: What a worker reserves of Ray's CPUs. Workers that take all of them leave none for the
            cluster's own tasks, which then never start; hence a fraction.
        gpus_per_worker: What a worker reserves of a GPU.
        batch_size: Rollouts that a worker draws at the same time; they must fit in its memory.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
        progress: Called after each write with the rollouts there are, those wanted, and the speed.

    Returns:
        How many rollouts were drawn.

    Raises:
        InputError: Ray is not installed, the model cannot be loaded, or a prompt is too long for its context.
        MismatchError: The store was made with other settings.
        StorageError: The store cannot be written, or somebody else is writing to it.
        ClusterError: A worker raised an error, or the cluster is gone; what was written is kept.
    """
    ray = _import_ray()
    if num_samples < 1 or num_workers < 1 or batch_size < 1:
        raise InputError(f"num_samples is {num_samples}, num_workers {num_workers}, batch_size {batch_size}",
                         where="sample_on_cluster", hint="All must be at least 1")  # fmt: skip
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    key = RolloutKey.of(model, tokenizer, max_new_tokens=max_new_tokens, seed=seed)
    rollouts = RolloutStore.open(store, key)
    tokens = prompt_token_ids(tokenizer, prompts)
    config = AutoConfig.from_pretrained(adapter_base(model), trust_remote_code=trust_remote_code)
    require_fit(SimpleNamespace(config=config), prompts, tokens, max_new_tokens)
    report = progress or no_progress
    total = len({prompt.id for prompt in prompts}) * num_samples
    with rollouts.writing():
        pending = deque(missing_rollouts(rollouts, prompts, tokens, num_samples))
        done = total - sum(len(one.indices) for one in pending)
        report(done, total, "")
        if not pending:
            return 0
        batches: list[dict[str, str]] = []
        while pending:
            batches.append({"batch": json.dumps([asdict(one) for one in take_batch(pending, batch_size)])})
        # One block per batch: it is drawn, sent back and written by itself.
        drawn_batches = ray.data.from_items(batches, override_num_blocks=len(batches)).map_batches(
            _Worker,
            fn_constructor_args=(str(model), key, trust_remote_code, allow_pickle),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(batches)), max_tasks_in_flight_per_actor=2),
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
        )
        drawn_batches.context.enable_progress_bars = False  # there is `progress`
        drawn, num_tokens, started = 0, 0, time.monotonic()
        try:
            for table in drawn_batches.iter_batches(batch_size=None, batch_format="pyarrow"):
                rollouts.append(table.select(ROLLOUT_SCHEMA.names).cast(ROLLOUT_SCHEMA))
                drawn += table.num_rows
                num_tokens += sum(table["num_tokens"].to_pylist())
                speed = num_tokens / max(time.monotonic() - started, 1e-9)
                report(done + drawn, total, f"{speed:,.0f} tokens/s")
        except ray.exceptions.RayError as error:
            reason = str(error).strip().rsplit("\n", maxsplit=1)[-1]
            raise ClusterError(f"the cluster stopped after {counted(drawn, 'rollout')} ({reason})", where=str(store),
                               hint="Fix that and start again: only what is missing is drawn") from error  # fmt: skip
    return drawn


class _Worker:
    """Holds a model and draws batches."""

    def __init__(self, model: str, key: RolloutKey, trust_remote_code: bool, allow_pickle: bool) -> None:
        self._model, self._tokenizer = load_policy(
            model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        self._key = key
        self._end_tokens = end_tokens(self._model, self._tokenizer)

    def __call__(self, row: Mapping[str, Any]) -> pa.Table:
        batch = [Missing(**one) for one in json.loads(str(row["batch"][0]))]
        rows = draw_batch(self._model, self._tokenizer, batch, self._end_tokens, self._key)
        return pa.table(rows, schema=ROLLOUT_SCHEMA)


def _import_ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise InputError("Ray is not installed", where="sample_on_cluster",
                         hint="pip install 'infalign[ray]'") from error  # fmt: skip
    return ray
