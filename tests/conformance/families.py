"""Tokenizers of five families, each with a policy that says ` the` or ` mat` and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "the cat sat on the mat",
    "a cat and the dog sat",
    "user: the cat\nassistant: the mat",
    "say one two three four",
    "the mat the mat the mat the the",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<|end_of_text|>"]
SAID = (" the", " mat")
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


def _byte_level(split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    own: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    if split:
        own = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLIT), "isolated"), own])
    tokenizer.pre_tokenizer = own
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 20,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _gpt2() -> Tokenizer:
    return _byte_level(split=False)


def _llama3() -> Tokenizer:
    tokenizer = _byte_level(split=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return tokenizer


def _llama2() -> Tokenizer:
    letters = sorted({letter for line in TEXT for letter in line.replace(" ", "▁")})
    words = sorted({f"▁{word}" for line in TEXT for word in line.split()})
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges: list[tuple[str, str]] = []
    for word in words:  # every beginning of a word is a piece, so that each word is one
        for length in range(2, len(word) + 1):
            if word[:length] not in pieces:
                pieces.append(word[:length])
                merges.append((word[: length - 1], word[length - 1]))
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return tokenizer


def _bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.train_from_iterator(
        TEXT * 20, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return tokenizer


def _unigram() -> Tokenizer:
    words = sorted({f"▁{word}" for line in TEXT for word in line.split()})
    letters = sorted({letter for line in TEXT for letter in line.replace(" ", "▁")})
    pieces = [*((one, 0.0) for one in SPECIAL), *((one, -2.0) for one in words), *((one, -8.0) for one in letters)]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


FAMILIES = {"gpt2": _gpt2, "llama2": _llama2, "llama3": _llama3, "bert": _bert, "unigram": _unigram}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    tokenizer = FAMILIES[family]()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
        model_max_length=256,
    )


def make_policy(family: str, folder: Path) -> Path:
    """A Llama whose next token depends on the last one alone: a word, then one of two end tokens."""
    tokenizer = make_tokenizer(family)
    size = len(tokenizer) + len(tokenizer) % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=[3, 4],
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    words = [tokenizer("cat" + said, add_special_tokens=False)["input_ids"][-1] for said in SAID]
    assert [tokenizer.decode([words[0], one])[-4:] for one in words] == list(SAID), "each is one token"
    after = torch.full((size, size), -3.0)  # logits of the next token, by the last one
    after[:, words] = 3.0
    after[words] = -3.0
    after[words[0], 3] = after[words[1], 4] = 3.0
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(after.T)
    model.generation_config = GenerationConfig(eos_token_id=[3, 4], bos_token_id=2, pad_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
