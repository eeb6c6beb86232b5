"""Rollouts: how much faster than the obvious loops, measured side by side in one run.

    python benchmarks/rollouts.py [--model FOLDER --reward FOLDER] [--prompts 24] [--samples 64] [--json]

Without models it makes random ones of the test bed's size. Prints, for this machine:

* tokens/s of `infalign.rollouts.sample`, store included, and of `model.generate(num_return_sequences=K)` in a loop;
* the share of the time that the store takes;
* responses/s of `SequenceClassificationReward` and of scoring one by one, as a text-classification pipeline does.

Repeats are interleaved, so that a busy machine slows both sides alike; the median of the ratios is reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from infalign.rewards.score import SequenceClassificationReward
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.models import load_policy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.toy import random_llama


def mixed_prompts(count: int, longest: int) -> list[Prompt]:
    """Prompts of mixed lengths, from a few bytes to `longest`."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghij klmnopq rstuv wxyz"))
    return [Prompt("".join(rng.choice(letters, int(n)))) for n in rng.integers(5, longest, count)]


def plain_loop(model, tokenizer, prompts, num_samples, max_new_tokens) -> int:
    """What one writes first: `generate` with K return sequences, one prompt after the other."""
    tokens = 0
    for prompt in prompts:
        inputs = tokenizer(prompt.prompt, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        out = model.generate(
            **inputs,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=num_samples,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).cumsum(1)
        tokens += int(((ended == 0) | ((ended == 1) & (new == tokenizer.eos_token_id))).sum())
    return tokens


class TimedStore(RolloutStore):
    """A store that measures itself."""

    seconds = 0.0

    def append(self, rows) -> None:
        """Append, and add up the time."""
        start = time.perf_counter()
        super().append(rows)
        self.seconds += time.perf_counter() - start


def our_sampler(model, tokenizer, prompts, num_samples, max_new_tokens, folder, seed) -> tuple[int, float]:
    """Tokens drawn, and the seconds the store took."""
    key = RolloutKey("benchmark", tokenizer_fingerprint(tokenizer), max_new_tokens, seed)
    store = TimedStore.open(folder / f"store-{seed}", key)
    sample(model, tokenizer, prompts, num_samples, store=store)
    return int(sum(store.table(["num_tokens"])["num_tokens"].to_pylist())), store.seconds


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """All figures."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = {"hidden_size": 96, "num_layers": 2, "num_heads": 4, "max_length": 256, "spread": 0.3}
        model_path = arguments.model or random_llama(folder / "model", **size)
        reward_path = arguments.reward or random_llama(folder / "reward", reward_model=True, **size)
        model, tokenizer = load_policy(model_path)
        prompts = mixed_prompts(arguments.prompts, arguments.longest)
        plain, ours, store_share = [], [], []
        for repeat in range(arguments.repeats + 1):  # the first warms up and does not count
            start = time.perf_counter()
            tokens = plain_loop(model, tokenizer, prompts, arguments.samples, arguments.max_new_tokens)
            plain.append(tokens / (time.perf_counter() - start))
            start = time.perf_counter()
            tokens, in_store = our_sampler(
                model, tokenizer, prompts, arguments.samples, arguments.max_new_tokens, folder, repeat
            )
            seconds = time.perf_counter() - start
            ours.append(tokens / seconds)
            store_share.append(in_store / seconds)
        figures["tokens/s, generate loop"] = median(plain[1:])
        figures["tokens/s, infalign"] = median(ours[1:])
        figures["sampling ratio"] = median(o / p for o, p in zip(ours[1:], plain[1:], strict=True))
        figures["store share of time"] = median(store_share[1:])

        source = SequenceClassificationReward(reward_path)
        texts = [prompts[i % len(prompts)].prompt for i in range(arguments.scored)]
        completions = ["x" * (i % 30) for i in range(arguments.scored)]
        source.score(texts[:8], completions[:8])
        one_by_one = pipeline(
            "text-classification",
            model=AutoModelForSequenceClassification.from_pretrained(reward_path, dtype=torch.float32).to(model.device),
            tokenizer=AutoTokenizer.from_pretrained(reward_path),
            function_to_apply="none",
            device=model.device,
        )
        ratios, slow, fast = [], [], []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            expected = [
                one_by_one(text + completion)[0]["score"] for text, completion in zip(texts, completions, strict=True)
            ]
            slow.append(len(texts) / (time.perf_counter() - start))
            start = time.perf_counter()
            got = source.score(texts, completions)
            fast.append(len(texts) / (time.perf_counter() - start))
            ratios.append(fast[-1] / slow[-1])
            np.testing.assert_allclose(got, expected, atol=1e-2 if model.device.type == "cuda" else 1e-4)
        figures["responses/s, pipeline loop"] = median(slow)
        figures["responses/s, infalign"] = median(fast)
        figures["scoring ratio"] = median(ratios)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--reward")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--longest", type=int, default=150)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads; by default torch's own choice")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    figures = measure(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    if arguments.json:
        print(json.dumps({"device": device, **figures}))
        return
    print(f"on {device}:")
    for name, value in figures.items():
        print(f"  {name:30s} {value:10.3f}" if value < 100 else f"  {name:30s} {value:10,.0f}")


if __name__ == "__main__":
    main()
