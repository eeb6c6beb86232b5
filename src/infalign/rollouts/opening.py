"""Open a policy: a Hugging Face folder, a hub name, an adapter folder, or a folder with a policy.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infalign.errors import InputError
from infalign.rollouts.adapters import EMBEDDINGS, adapter_weights, put_on
from infalign.rollouts.key import model_fingerprint
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.models import load_policy, load_tokenizer
from infalign.rollouts.moved import adapter_base
from infalign.rollouts.policy import Adapter, LocalPolicy, Policy
from infalign.rollouts.policy_file import MIXTURE, RESHAPED, PolicyFile, read_policy_file, write_policy_file
from infalign.rollouts.reshaped import ReshapedPolicy


def open_policy(
    model: str | Path | Policy, *, trust_remote_code: bool = False, allow_pickle: bool = False, dtype: str | None = None
) -> Policy:
    """Open a policy of this machine.

    Args:
        model: A model's folder (full weights or a PEFT adapter), a hub name, or a folder with a policy.json: a mixture
            or a reshaped policy, written by `save_policy`. A policy is given back as it is.
        trust_remote_code: Run Python code that comes with a model.
        allow_pickle: Also accept weights that are not safetensors.
        dtype: As in `load_policy`.

    Raises:
        InputError: As `load_policy`; or the policy.json cannot be understood.
    """
    return PolicyOpener(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, dtype=dtype).open(model)


def open_policies(models: Sequence[str | Path | Policy], **options: Any) -> list[Policy]:
    """`open_policy` for several: each base is in memory once, whatever adapters are on it."""
    opener = PolicyOpener(**options)
    return [opener.open(model) for model in models]


class PolicyOpener:
    """Opens policies that share models: one that is opened twice, or an adapter and its base, are in memory once.

    Args:
        **options: As for `open_policy`.
    """

    def __init__(
        self, *, trust_remote_code: bool = False, allow_pickle: bool = False, dtype: str | None = None
    ) -> None:
        self._options: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "allow_pickle": allow_pickle,
            "dtype": dtype,
        }
        self._opened: dict[str, LocalPolicy] = {}  # by fingerprint
        self._carriers: dict[str, Any] = {}  # models that hold a base, by its fingerprint

    def open(self, model: str | Path | Policy) -> Policy:
        """As `open_policy`."""
        if isinstance(model, Policy):
            return model
        file = read_policy_file(model)
        if file is None:
            return self._open_local(str(model))
        base, *aligned = (self.open(one) for one in (file.base, *file.aligned))
        name = str(model)
        if file.kind == MIXTURE:
            return MixturePolicy(base, aligned, file.settings["weights"], name=name)
        return ReshapedPolicy(base, aligned, reshaping_from_dict(file.settings["reshaping"]), name=name)

    def _open_local(self, model: str) -> LocalPolicy:
        name = model_fingerprint(model)
        if name not in self._opened:
            base = adapter_base(model)
            base_name = name if base == model else model_fingerprint(base)
            carrier = None if self._brings_embeddings(model) else self._carriers.get(base_name)
            if carrier is None:
                policy = self._load(model, is_adapter=base != model)
                if not self._brings_embeddings(model):
                    self._carriers[base_name] = policy.model
            else:
                policy = self._join(carrier, model, is_adapter=base != model)
            self._opened[name] = policy
        return self._opened[name]

    def _brings_embeddings(self, model: str) -> bool:
        """Whether it is an adapter that changes its base, which it can then share with nobody."""
        if adapter_base(model) == model:
            return False
        weights = adapter_weights(model, allow_pickle=self._options["allow_pickle"])
        return any(
            any(part in name for part in EMBEDDINGS) and ".lora_" not in name and tensor.ndim == 2
            for name, tensor in weights.items()
        )

    def _load(self, model: str, *, is_adapter: bool) -> LocalPolicy:
        loaded, tokenizer = load_policy(model, **self._options)
        return LocalPolicy(loaded, tokenizer, source=model, adapter=Adapter("default") if is_adapter else None)

    def _join(self, carrier: Any, model: str, *, is_adapter: bool) -> LocalPolicy:
        """A policy on a model that is in memory already: its base, or one more adapter on it."""
        tokenizer = load_tokenizer(model, trust_remote_code=self._options["trust_remote_code"])
        if not is_adapter:
            return LocalPolicy(carrier, tokenizer, source=model, adapter=Adapter(None))
        for policy in self._opened.values():
            if policy.model is carrier and policy.adapter is None:
                policy.adapter = Adapter(None)
        name = f"adapter-{len(self._opened)}"
        put_on(carrier, model, name, allow_pickle=self._options["allow_pickle"])
        carrier.eval()
        return LocalPolicy(carrier, tokenizer, source=model, adapter=Adapter(name))


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write a mixture or a reshaped policy as a folder that `open_policy` opens. Its models stay where they are.

    Args:
        policy: A mixture or a reshaped policy of models with a known source.
        folder: Where to write policy.json.

    Raises:
        InputError: It is another kind of policy, or the source of a model is not known.
        StorageError: The folder cannot be written.
    """
    if isinstance(policy, MixturePolicy):
        kind, settings = MIXTURE, {"weights": list(policy.weights)}
    elif isinstance(policy, ReshapedPolicy):
        kind, settings = RESHAPED, {"reshaping": policy.reshaping.to_dict()}
    else:
        raise InputError(f"{policy.name} is neither a mixture nor reshaped", where="save_policy",
                         hint="Save the model itself by save_pretrained")  # fmt: skip
    base, *aligned = (_source(one) for one in (policy.base, *policy.aligned))
    write_policy_file(folder, PolicyFile(kind, base, tuple(aligned), settings))


def reshaping_from_dict(content: dict[str, Any]) -> Any:
    """The reshaping that a policy.json holds."""
    from infalign.reshape.reshaping import Reshaping

    return Reshaping.from_dict(content)


def _source(policy: Policy) -> str:
    if not isinstance(policy, LocalPolicy) or policy.source is None:
        raise InputError(f"it is not known where {policy.name} came from", where="save_policy",
                         hint="Open its models by open_policy, or give LocalPolicy a source")  # fmt: skip
    return str(policy.source)
