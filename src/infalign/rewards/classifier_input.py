"""What a sequence classifier reads: cut to its limit with its special tokens kept, padded so that no token is mistaken.

Many classifiers find the token to judge by the ids: the last one that is not `config.pad_token_id`. A text may well end
with that token. So a batch is padded with an id that none of its texts holds, and the model is told that id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from infalign.rollouts.embeddings import require_embeddings

_NO_TOKEN = -1  # told to a model where no row is padded: equal to no token


def cut(tokenizer: Any, ids: Sequence[int], limit: int) -> list[int]:
    """At most `limit` tokens of a text: its end, between the special tokens that stand around it.

    The end is what is judged, so a long text loses its beginning; but not the `[CLS]` or the beginning-of-sequence
    token, without which a model reads something it was not trained on.

    Args:
        tokenizer: Of the model.
        ids: The text with its special tokens.
        limit: At least 1.
    """
    if len(ids) <= limit:
        return list(ids)
    head, tail = _around(tokenizer, ids)
    room = limit - len(head) - len(tail)
    if room < 1:  # no room for the text beside them
        return list(ids[-limit:])
    inside = ids[len(head) : len(ids) - len(tail)]
    return [*head, *inside[-room:], *tail]


def _around(tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The special tokens at both ends that the tokenizer writes around any text, as far as they are there."""
    alone = list(tokenizer("", verbose=False)["input_ids"])
    head: list[int] = []
    tail: list[int] = []
    for split in range(len(alone), -1, -1):
        before, after = alone[:split], alone[split:]
        if list(ids[:split]) == before and list(ids[len(ids) - len(after) :]) == after:
            head, tail = before, after
            break
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    if not head and ids[0] in first:  # a chat template writes it itself
        head = [ids[0]]
    return head, tail


def input_limit(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """The longest input in tokens: what is wanted, as far as the model's positions and the tokenizer allow."""
    config = model.config.get_text_config()
    limits = [wanted, getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index: the first ones are never used.
        offset = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding) and offset is not None:
            limits.append(module.num_embeddings - offset - 1)
    return min(int(limit) for limit in limits if limit is not None)


def scores(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], size: int) -> list[float]:
    """The model's logit for each text, in batches of `size` that are padded on the right.

    Args:
        model: With one output.
        tokenizer: Its tokenizer.
        rows: Token ids, none empty.
        size: Texts in a batch.
    """
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    vocabulary = model.get_input_embeddings().num_embeddings
    where = str(getattr(model, "name_or_path", "") or "reward model")
    require_embeddings(rows, vocabulary, where, tokenizer=tokenizer)
    with torch.inference_mode():
        for batch in _batches(rows, order, size, vocabulary):
            pad = _padding(model, tokenizer, [rows[row] for row in batch], vocabulary)
            longest = len(rows[batch[0]])
            ids_BL = torch.full((len(batch), longest), max(pad, 0), dtype=torch.long)
            mask_BL = torch.zeros(len(batch), longest, dtype=torch.long)
            for b, row in enumerate(batch):
                ids_BL[b, : len(rows[row])] = torch.tensor(rows[row])
                mask_BL[b, : len(rows[row])] = 1
            with _told(model, pad):
                out = model(input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device))
            for row, score in zip(batch, out.logits[:, 0].double().tolist(), strict=True):
                found[row] = score
    return found


def _batches(rows: Sequence[Sequence[int]], order: list[int], size: int, vocabulary: int) -> Iterator[list[int]]:
    """Rows of `order` in batches; where texts hold every token there is, only texts of one length together."""
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if len({token for row in batch for token in rows[row]}) < vocabulary:
            yield batch
            continue
        lengths = sorted({len(rows[row]) for row in batch}, reverse=True)
        yield from ([row for row in batch if len(rows[row]) == length] for length in lengths)


def _padding(model: Any, tokenizer: Any, texts: Sequence[Sequence[int]], vocabulary: int) -> int:
    """A token that none of the texts holds: the model's own padding token where it can be."""
    if len({len(text) for text in texts}) == 1:
        return _NO_TOKEN
    held = {token for text in texts for token in text}
    own = [model.config.get_text_config().pad_token_id, tokenizer.pad_token_id]
    usable = [one for one in own if one is not None and 0 <= one < vocabulary and one not in held]
    return usable[0] if usable else next(one for one in range(vocabulary) if one not in held)


@contextmanager
def _told(model: Any, pad: int) -> Iterator[None]:
    """While the model runs, this is its padding token."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [getattr(config, "pad_token_id", None) for config in configs]
    for config in configs:
        config.pad_token_id = pad
    try:
        yield
    finally:
        for config, value in zip(configs, before, strict=True):
            config.pad_token_id = value
