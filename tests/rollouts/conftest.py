"""Real models, as small as they can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from infalign.run.testbed.toy import random_llama

logging.disable_progress_bar()
torch.set_num_threads(1)


@dataclass(frozen=True)
class Toy:
    """A saved model, loaded."""

    path: Path
    model: Any
    tokenizer: Any


def load(path: Path) -> Toy:
    return Toy(path, AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))


@pytest.fixture(scope="session")
def words(tmp_path_factory) -> Toy:
    """Five tokens (pad, end, a, b, c): every response can be enumerated."""
    return load(random_llama(tmp_path_factory.mktemp("words"), 5, spread=1.2, max_length=24, seed=1))


@pytest.fixture(scope="session")
def letters(tmp_path_factory) -> Toy:
    """A byte-level model that takes any text."""
    return load(random_llama(tmp_path_factory.mktemp("letters"), spread=0.7, num_layers=2, max_length=96, seed=2))


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """A byte-level reward model."""
    return random_llama(tmp_path_factory.mktemp("reward"), reward_model=True, max_length=64, seed=3)
