"""A gold reward for the docstring testbed: other pairs, another seed, another body, and it has seen the answers.

    python benchmarks/gold_reward.py OUT --seed 0 --reference runs/d0/models/reference
    infalign run recipes/docstrings_best_of_16.yaml --out runs/d0 --set 'evaluation.gold=[{model: OUT, name: gold}]'

The reward that trains policies learns from pairs about the demonstrated functions. This one learns from pairs about all
functions, the held-out ones too, drawn with another seed: on the prompts of the evaluation it knows the true sentence,
where the training reward generalises. It only judges.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from infalign.run.testbed.corpus import docstring_corpus
from infalign.run.testbed.models import DOCSTRING_REWARD, train_reward_model
from infalign.run.testbed.quiet import quiet


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description="Train a gold reward for the docstring testbed.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="whose tokenizer it shares")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet()
    _, pairs = docstring_corpus(1000 + options.seed)
    shown = [replace(pair, held_out=False) for pair in pairs]
    spec = replace(DOCSTRING_REWARD, hidden_size=192, num_layers=3, num_heads=6)
    result = train_reward_model(shown, options.reference, options.out, spec=spec, seed=1000 + options.seed)
    print(f"{result.train_pairs} pairs: {options.out}")


if __name__ == "__main__":
    main()
