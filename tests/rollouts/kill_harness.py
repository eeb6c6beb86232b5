"""Sample into a store, over and over killed at a random moment; run by test_kill.py in a process of its own.

Arguments: model folder, output folder, number of kills. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from infalign.rewards.score import FunctionReward, score_store
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore

PROMPTS = [Prompt(f"prompt number {i}") for i in range(40)]
NUM_SAMPLES = 30
TOTAL = len(PROMPTS) * NUM_SAMPLES


def length(prompts, completions):
    """A reward."""
    return [float(len(completion)) for completion in completions]


def work(store, model, tokenizer, say):
    """Everything that a run does with a store: draw, then score."""
    sample(
        model, tokenizer, PROMPTS, NUM_SAMPLES, store=store, batch_size=24, progress=lambda d, t, _: say("rollouts", d)
    )
    score_store(store, FunctionReward(length, key="length"), PROMPTS, lambda d, t, _: say("rewards", d), chunk_size=48)


def killed_run(path, key, model, tokenizer, wait):
    """Work in a child process and kill it `wait` seconds after its first report; returns what it had reported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        work(
            RolloutStore.open(path, key),
            model,
            tokenizer,
            lambda *said: os.write(writer, f"{json.dumps(said)}\n".encode()),
        )
        os._exit(0)
    os.close(writer)
    select.select([reader], [], [], 60)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = b""
    while chunk := os.read(reader, 1 << 16):
        said += chunk
    os.close(reader)
    lines = [json.loads(line) for line in said.decode().split("\n")[:-1]]
    return dict(lines), os.WIFSIGNALED(status)


def check(store, reported):
    """No row twice, and every row there that had been reported as done."""
    pairs = [(row["prompt_id"], row["index"]) for row in store.table(["prompt_id", "index"]).to_pylist()]
    assert len(set(pairs)) == len(pairs), "a rollout is there twice"
    assert len(pairs) >= reported.get("rollouts", 0), "a reported rollout is gone"
    rewards = store._reward_log("length").read()
    assert rewards.num_rows == store.rewards("length").num_rows, "a rollout was scored twice"
    assert rewards.num_rows >= reported.get("rewards", 0), "a reported reward is gone"
    return len(pairs), rewards.num_rows


def main():
    """Kill, check, start again; then compare with a run that was never killed."""
    model_path, out, wanted = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # a forked child must not inherit a thread pool
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    key = RolloutKey("toy", tokenizer_fingerprint(tokenizer), max_new_tokens=6, seed=3)
    started = time.monotonic()
    RolloutStore.open(out / "warm", key)
    whole = RolloutStore.open(out / "whole", key)
    work(whole, model, tokenizer, lambda *said: None)
    whole_seconds = time.monotonic() - started
    chance = random.Random(0)
    kills, restarts, partial, ids = 0, 0, 0, [prompt.id for prompt in PROMPTS]
    while kills < wanted:
        path = out / f"killed-{restarts}"
        restarts += 1
        finished = False
        while not finished and kills < wanted:
            # About a dozen kills until a store is complete.
            reported, was_killed = killed_run(path, key, model, tokenizer, chance.uniform(0, whole_seconds / 6))
            store = RolloutStore.read(path)
            there, scored = check(store, reported)
            kills += was_killed
            partial += 0 < there < TOTAL or 0 < scored < TOTAL
            finished = not was_killed
        work(RolloutStore.open(path, key), model, tokenizer, lambda *said: None)
        assert check(store, {}) == (TOTAL, TOTAL)
        for column in ("token_ids", "text", "finish_reason"):
            assert store.lists_PK(column, ids, NUM_SAMPLES) == whole.lists_PK(column, ids, NUM_SAMPLES)
        assert (store.rewards_PK("length", ids, NUM_SAMPLES) == whole.rewards_PK("length", ids, NUM_SAMPLES)).all()
        left = [file.name for file in path.rglob("*.part")]
        assert not left, f"unfinished files were left: {left}"
    print(json.dumps({"kills": kills, "half-done": partial, "stores": restarts}))


if __name__ == "__main__":
    main()
