"""Load a policy: a Hugging Face folder, a hub name, or a PEFT adapter folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from infalign._io.hub import require_model
from infalign._io.wording import counted, first_line
from infalign.errors import InputError
from infalign.rollouts.adapters import is_adapter, num_outputs, put_on
from infalign.rollouts.embeddings import embedding_rows, require_embeddings
from infalign.rollouts.moved import adapter_base
from infalign.rollouts.policy_file import read_policy_file

ADAPTER = "default"  # what the first adapter on a model is called


def load_policy(
    model: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False, dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, padding on the left as generation needs.

    Args:
        model: Local folder (full weights or a PEFT adapter) or hub name.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
        dtype: Name of a torch dtype; by default float32 on a CPU, else what the weights are stored in.

    Raises:
        InputError: If there is no model, no tokenizer or no end-of-sequence token there, or a weight is missing.
    """
    if (file := read_policy_file(model)) is not None:
        raise InputError(
            f"this is a {file.kind} policy of several models, not a single one",
            where=str(model),
            hint=f"Use open_policy, or give one of its models: {file.base}, {', '.join(file.aligned)}",
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    # An adapter in bfloat16 on a CPU is slow and coarse; a GPU takes what the weights were stored in.
    torch_dtype: Any = dtype or ("auto" if torch.cuda.is_available() else torch.float32)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    base = adapter_base(model)
    require_model(base, f"{model} (its base)" if is_adapter(model) else None)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch_dtype,
            use_safetensors=None if allow_pickle else True,
            output_loading_info=True,
            **options,
        )
        policy, loading = loaded
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        mismatch = "ignore_mismatched_sizes" in str(error)
        reason = "the weights have other shapes than config.json says" if mismatch else first_line(error)
        raise InputError(
            f"no causal language model can be loaded ({reason})",
            where=str(model),
            hint="Give a folder with config.json and model.safetensors, or a hub name",
        ) from error
    require_all_weights(loading, base)
    if is_adapter(model):
        put_on(policy, model, ADAPTER, allow_pickle=allow_pickle)
    require_end_and_padding(policy, tokenizer, str(model))
    device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return policy.to(device).eval(), tokenizer


def load_classifier(
    model: str, *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a sequence-classification model with one output, or an adapter that makes one of a causal base.

    Args:
        model: Local folder (full weights or a PEFT adapter) or hub name.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.

    Raises:
        InputError: If there is no such model or no tokenizer there, it has several outputs, or a weight is missing.
    """
    base, adapter = adapter_base(model), is_adapter(model)
    # The head of an adapter's base is drawn at random; the adapter brings its own.
    outputs = num_outputs(model, allow_pickle=allow_pickle) if adapter else None
    options: dict[str, Any] = {} if outputs is None else {"num_labels": outputs}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            base,
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
            dtype="auto" if torch.cuda.is_available() else torch.float32,
            output_loading_info=True,
            **options,
        )
        classifier, loading = loaded
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"no sequence-classification model can be loaded ({first_line(error)})",
            where=model,
            hint="Give a folder with config.json, model.safetensors and a tokenizer",
        ) from error
    if classifier.config.num_labels != 1:
        raise InputError(f"the model has {counted(classifier.config.num_labels, 'output')}", where=model,
                         hint="A reward model has one")  # fmt: skip
    if outputs is not None:
        heads = [name for name in loading["missing_keys"] if name.split(".")[0] in ("score", "classifier")]
        loading = {**loading, "missing_keys": set(loading["missing_keys"]) - set(heads)}
    require_all_weights(loading, model)
    if adapter:
        put_on(classifier, model, ADAPTER, allow_pickle=allow_pickle)
    return classifier, tokenizer


def require_end_and_padding(model: Any, tokenizer: Any, where: str) -> None:
    """See to it that the tokens which every text gets have an embedding; padding, which no model sees, may be another.

    Raises:
        InputError: If the end-of-sequence token has none.
    """
    size = embedding_rows(model)
    require_embeddings([[tokenizer.eos_token_id]], size, where, tokenizer=tokenizer, what="every response")
    if size is not None and tokenizer.pad_token_id >= size:
        tokenizer.pad_token = tokenizer.eos_token


def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a policy's tokenizer, padding on the left as generation needs.

    Args:
        model: Local folder or hub name; of a folder with a policy.json, the tokenizer of its base.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        InputError: If there is no tokenizer or no end-of-sequence token there.
    """
    file = read_policy_file(model)
    if file is not None:
        return load_tokenizer(file.base, trust_remote_code=trust_remote_code)
    require_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"no tokenizer can be loaded ({first_line(error)})",
            where=str(model),
            hint="Give a Hugging Face model folder that holds its tokenizer (tokenizer.json), or a hub name",
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token, so a response could never end",
            where=str(model),
            hint="Set eos_token in tokenizer_config.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_all_weights(loading: Mapping[str, Any], where: str) -> None:
    """Refuse a model of which transformers has drawn a part at random because the file does not hold it.

    Raises:
        InputError: Naming the first missing weight.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{counted(len(missing), 'weight is', 'weights are')} not in the file, the first is {missing[0]}",
            where=where,
            hint="Give a model of this kind: a policy has a language-model head, a reward model a score head",
        )
