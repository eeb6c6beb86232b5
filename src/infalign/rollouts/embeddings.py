"""Which tokens a model has embeddings for; tokenizers may have more, and a model shown such a token would fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infalign.errors import InputError


def embedding_rows(model: Any) -> int | None:
    """How many tokens a model has embeddings for, also behind what PEFT puts around them.

    Args:
        model: A model, or anything with its `config`.
    """
    if hasattr(model, "get_input_embeddings"):
        embedding = model.get_input_embeddings()
        return int(getattr(embedding, "original_module", embedding).weight.shape[0])
    return getattr(model.config.get_text_config(), "vocab_size", None)


def require_embeddings(
    rows: Sequence[Sequence[int]], size: int | None, where: str, *, tokenizer: Any = None, what: str = "text"
) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        rows: Texts as token ids.
        size: How many tokens there are embeddings for; None where nobody knows.
        where: The model, for the message.
        tokenizer: Tells how the token is written.
        what: What the texts are.

    Raises:
        InputError: Naming the first such token.
    """
    if size is None:
        return
    for row, ids in enumerate(rows):
        if ids and max(ids) >= size:
            beyond = next(one for one in ids if one >= size)
            token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(beyond)!r})"
            raise InputError(
                f"{what} {row} holds token number {beyond}{token}, and the model has embeddings for {size:,}",
                where=where,
                hint="Use the tokenizer that belongs to the model, or resize its embeddings, then train it",
            )
