"""Byte-level tokenizers with distinct pad and end tokens; every text is representable, so there is no unknown token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from infalign.errors import InputError

PAD_TOKEN, EOS_TOKEN = "<|pad|>", "<|end|>"
PAD_ID, EOS_ID = 0, 1  # special tokens come first in the vocabulary
SMALLEST_VOCABULARY = 258
"""256 bytes, the pad and the end token."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, max_length: int | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every text is representable, so there is no unknown token.

    It adds no special tokens by itself, pads on the left (for generation) and has distinct pad and end tokens.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Upper limit of the vocabulary, at least 258 (256 bytes, pad, end).
        max_length: Stored as `model_max_length`.

    Returns:
        The tokenizer; `save_pretrained` writes an ordinary folder.

    Raises:
        InputError: If `vocab_size` is under 258.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"a vocabulary of {vocab_size} cannot hold 256 bytes and two special tokens", where="vocab_size"
        )
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD_TOKEN, EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        truncation_side="left",
        clean_up_tokenization_spaces=False,
        **({} if max_length is None else {"model_max_length": max_length}),
    )
