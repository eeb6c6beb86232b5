"""Whether an adapter can be put on a model, told before anything is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from infalign._io.wording import first_line
from infalign.errors import InputError
from infalign.training.running import lora_config


def check_lora(lora: Mapping[str, Any], skeleton: Any) -> None:
    """Refuse an adapter that cannot be put on a model.

    Args:
        lora: Fields of PEFT's LoraConfig.
        skeleton: A model of the same architecture without weights, on the meta device; it is changed.

    Raises:
        InputError: A field is unknown or unusable, or a module that it names is not there.
    """
    from peft import inject_adapter_in_model

    config = lora_config(lora)
    parts = {name.rpartition(".")[2]: part for name, part in skeleton.named_modules()}
    linear = sorted(name for name, part in parts.items() if hasattr(part, "in_features") or hasattr(part, "nf"))
    there = f"The model's linear modules are: {', '.join(linear)}"
    for field in ("target_modules", "modules_to_save"):
        named = getattr(config, field, None)
        for name in [] if named is None or isinstance(named, str) else sorted(named):
            if name.rpartition(".")[2] not in parts:
                raise InputError(f"the model has no module {name!r} ({field})", where="training.lora", hint=there)
    try:
        with torch.device("meta"):
            inject_adapter_in_model(config, skeleton)
    except NotImplementedError:  # of some initialisations, which need weights
        return
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise InputError(f"PEFT does not take these settings ({reason})", where="training.lora", hint=there) from error


def testbed_skeleton() -> Any:
    """A Llama without weights, as the testbed's models are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=32))
