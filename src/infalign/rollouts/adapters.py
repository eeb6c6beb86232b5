"""Put a PEFT adapter on a model, by PEFT's own functions, and make sure that all of it is there.

transformers' own loader leaves a part of some adapters at random (the magnitudes of DoRA) and does not know adapters
that bring embeddings of another size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from infalign._io.wording import first_line
from infalign.errors import InputError
from infalign.rollouts.embeddings import embedding_rows

CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# How embeddings and heads on them are called in the models that there are.
EMBEDDINGS = ("embed", "wte", "lm_head", "embed_out")
_COPY = re.compile(r"\.(modules_to_save|original_module)\.")
_HEADS = ("score", "classifier", "classification_head")


def is_adapter(model: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(model) / CONFIG).is_file()


def adapter_weights(folder: str | Path, *, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """The weights of an adapter folder, by PEFT's names.

    Raises:
        InputError: There are none, or they are damaged, or a pickle that is not allowed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / _WEIGHTS
    pickled = path.with_suffix(".bin")
    try:
        if path.is_file():
            return load_file(path)
        if pickled.is_file() and allow_pickle:
            return torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the adapter's weights cannot be read ({error})", where=str(folder),
                         hint="Copy or save it again") from error  # fmt: skip
    hint = (
        "If you trust it: --allow-pickle, or allow_pickle: true in the recipe"
        if pickled.is_file()
        else f"An adapter folder holds {_WEIGHTS}"
    )
    raise InputError("there are no adapter weights in safetensors here", where=str(folder), hint=hint)


def num_outputs(folder: str | Path, *, allow_pickle: bool = False) -> int | None:
    """How many outputs the head has that a classifier's adapter brings; None where it brings none."""
    for name, weight in adapter_weights(folder, allow_pickle=allow_pickle).items():
        parts = name.split(".")
        if parts[-1] == "weight" and any(head in parts for head in _HEADS) and not any("lora" in one for one in parts):
            return int(weight.shape[0])
    return None


def changes_base(model: Any, weights: dict[str, torch.Tensor]) -> int | None:
    """How many tokens the embeddings have that an adapter brings along; None where it brings none.

    Such an adapter cannot share its base with other policies.
    """
    own = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = {f"{_PREFIX}{name}.weight" for name, module in model.named_modules() if id(module) in own}
    rows = {int(weights[name].shape[0]) for name in names if name in weights}
    return max(rows) if rows else None


def put_on(model: Any, folder: str | Path, name: str, *, allow_pickle: bool = False) -> None:
    """Put an adapter on a model and turn it on; embeddings that it brings take the place of the model's.

    Args:
        model: A transformers model: the adapter's base, perhaps with other adapters.
        folder: The adapter.
        name: What to call it in the model.
        allow_pickle: Also accept weights that are not safetensors.

    Raises:
        InputError: It does not fit the model, is of a kind that cannot be put on one, or a part of it is missing.
    """
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    where = str(folder)
    weights = adapter_weights(folder, allow_pickle=allow_pickle)
    try:
        config: Any = PeftConfig.from_pretrained(where)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{CONFIG} cannot be read ({error})", where=where, hint="Save the adapter again") from error
    if config.is_prompt_learning:
        raise InputError(f"adapters of the kind {config.peft_type.value} change the prompt and cannot be put on a "
                         "model that others share", where=where,
                         hint="Give one that changes weights, such as LoRA or DoRA")  # fmt: skip
    config.inference_mode = True
    rows = changes_base(model, weights)
    if rows is not None and rows != embedding_rows(model):
        model.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with torch.random.fork_rng():  # what is drawn here is overwritten
            inject_adapter_in_model(config, model, adapter_name=name)
        bare = {key.removeprefix(_PREFIX): value for key, value in weights.items()}
        # Beside embeddings that are trained PEFT also writes copies under the names of its own wrappers.
        bare = {key: value for key, value in bare.items() if not _COPY.search(key)}
        found: Any = set_peft_model_state_dict(model, bare, adapter_name=name)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"the adapter does not fit its base model ({first_line(error)[:300]})",
            where=where,
            hint="base_model_name_or_path in adapter_config.json should name the model that it was trained on",
        ) from error
    wanted = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    missing, unknown = sorted(wanted - set(bare)), sorted(found.unexpected_keys)
    if missing or unknown:
        part = f"{missing[0]} is missing" if missing else f"nothing in the model takes {unknown[0]}"
        raise InputError(f"the adapter does not fit its base model ({part})", where=where,
                         hint="Save the adapter again, or name its base in adapter_config.json")  # fmt: skip
    model._hf_peft_config_loaded = True  # so that transformers knows of it
    for layer in adapted_layers(model):
        switch(layer, [name], off=False)
    model.requires_grad_(False)


def adapted_layers(model: Any) -> list[Any]:
    """The parts of a model that adapters change."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def switch(layer: Any, names: list[str], off: bool) -> None:
    """Turn adapters on in one of `adapted_layers`, or all off; what is trained stays as it is."""
    # PEFT's own switches also decide what is trained.
    trained = {name: weight.requires_grad for name, weight in layer.named_parameters()}
    for known in (getattr(layer, "_adapters", None), getattr(layer, "token_indices", None)):
        if known is not None:  # a part that only some of the adapters replace
            names = [name for name in names if name in known]
            off = off or not names
    if names:
        layer.set_adapter(names)
    layer.enable_adapters(not off)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(trained[name])
