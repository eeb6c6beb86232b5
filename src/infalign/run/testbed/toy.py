"""The smallest real models: untrained Llamas with their tokenizers, as ordinary Hugging Face folders, in a moment."""

from __future__ import annotations

import math
import os
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from infalign.errors import InputError
from infalign.run.testbed.quiet import quiet
from infalign.run.testbed.tokenizer import EOS_ID, EOS_TOKEN, PAD_ID, PAD_TOKEN, SMALLEST_VOCABULARY, train_tokenizer


def random_llama(
    out_dir: str | os.PathLike[str],
    vocab_size: int | None = None,
    *,
    hidden_size: int = 16,
    num_layers: int = 1,
    num_heads: int = 2,
    max_length: int = 64,
    spread: float = 1.0,
    reward_model: bool = False,
    seed: int = 0,
) -> Path:
    """Write a Llama with random weights, and a tokenizer that fits it.

    Args:
        out_dir: The folder to write.
        vocab_size: None for a byte-level tokenizer (258 tokens, any text). A number of at least 3 for a tokenizer of
            whole words between spaces: id 0 pads, id 1 ends, the others are "a", "b", ..., "z", "aa", ...; any
            other word is refused. A small number makes a policy that can be enumerated.
        hidden_size: Width of the model.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        max_length: The model's context in tokens.
        spread: Standard deviation of the logits over the vocabulary, or of the scores; 0 is the uniform policy.
        reward_model: Write a sequence classifier with one label instead of a language model.
        seed: Seed of the weights: the same seed on the same machine gives the same file.

    Returns:
        `out_dir` as a path.

    Raises:
        InputError: If `vocab_size` is under 3 or `num_heads` does not divide `hidden_size`.
    """
    if vocab_size is not None and vocab_size < 3:
        raise InputError(f"a vocabulary of {vocab_size} leaves no word besides pad and end", where="vocab_size")
    if hidden_size % num_heads:
        raise InputError(f"num_heads ({num_heads}) does not divide hidden_size ({hidden_size})", where="random_llama")
    tokenizer = _byte_tokenizer(max_length) if vocab_size is None else _word_tokenizer(vocab_size, max_length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=max_length,
        initializer_range=1 / math.sqrt(hidden_size),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    if reward_model:
        config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = LlamaForSequenceClassification(config) if reward_model else LlamaForCausalLM(config)
    with torch.no_grad():  # the last hidden state has unit mean square, so this is the logits' standard deviation
        (model.score if reward_model else model.lm_head).weight.mul_(spread)
    with quiet():
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
    return Path(out_dir)


def _byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    return train_tokenizer([], SMALLEST_VOCABULARY, max_length=max_length)


def _word_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    words = ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))
    vocabulary = {word: i for i, word in enumerate([PAD_TOKEN, EOS_TOKEN, *islice(words, vocab_size - 2)])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
