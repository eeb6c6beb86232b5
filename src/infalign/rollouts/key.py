"""What produced a rollout: enough to tell apart any two sources whose rollouts must not be mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infalign._io.hub import require_model
from infalign._io.inventory import read_object
from infalign._io.wording import first_line
from infalign.errors import InputError, MismatchError
from infalign.rollouts.moved import ADAPTER, adapter_base
from infalign.rollouts.policy_file import read_policy_file

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# These differ between two saves of one model without changing what it computes.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "use_cache")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
_OF_THE_FIT = ("predictions", "procedure", "beta")


@dataclass(frozen=True)
class RolloutKey:
    """What produced the rollouts of one store.

    Attributes:
        model: Fingerprint of the policy (`model_fingerprint`), or an endpoint's model name.
        tokenizer: Fingerprint of tokenizer and chat template (`tokenizer_fingerprint`).
        max_new_tokens: Longest response; a longer one is cut there and has `finish_reason` "length".
        seed: Seed of the sampling. Rollout `index` of a prompt depends on (seed, prompt, index) alone.
        temperature: Sampling temperature. 1 is the policy itself.
        top_p: Nucleus. 1 is the policy itself.
        sampler: Engine that drew them.
    """

    model: str
    tokenizer: str
    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    sampler: str = "transformers"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}", where="RolloutKey", hint="Give at least 1")
        if not (self.temperature > 0.0 and 0.0 < self.top_p <= 1.0):
            raise InputError(f"temperature is {self.temperature} and top_p {self.top_p}", where="RolloutKey",
                             hint="The temperature must be positive and top_p in (0, 1]")  # fmt: skip

    @classmethod
    def of(
        cls,
        model: str | Path,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        sampler: str = "transformers",
    ) -> RolloutKey:
        """The key of rollouts drawn from the model in a folder or on the hub, with a loaded tokenizer.

        Args:
            model: Model folder, adapter folder, or hub name.
            tokenizer: The loaded tokenizer.
            max_new_tokens: Longest response.
            seed: Seed of the sampling.
            temperature: Sampling temperature.
            top_p: Nucleus.
            sampler: Engine that draws.
        """
        fingerprint = model_fingerprint(model)
        return cls(fingerprint, tokenizer_fingerprint(tokenizer), max_new_tokens, seed, temperature, top_p, sampler)

    @property
    def samples_the_policy(self) -> bool:
        """Whether the rollouts follow the policy itself, not a sharpened or truncated version of it."""
        return self.temperature == 1.0 and self.top_p == 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def require_same(self, stored: RolloutKey, where: str) -> None:
        """Raise MismatchError, saying what differs, unless `stored` equals this key."""
        asked, there = self.to_dict(), stored.to_dict()
        different = [
            f"{name} was {there[name]!r} and is now {asked[name]!r}" for name in asked if asked[name] != there[name]
        ]
        if different:
            raise MismatchError("these rollouts were made with other settings: " + "; ".join(different), where=where,
                                hint="Use another folder, or go back to what made them")  # fmt: skip


def model_fingerprint(model: str | Path) -> str:
    """Identity of a model's weights and architecture.

    For a folder: a hash of its weight files and configuration, the same wherever the folder lies; for one with a
    policy.json, of the models it names and of what it says. For a hub name: the name and its commit.

    Raises:
        InputError: There are no weights in the folder, or no such model on the hub.
    """
    path = Path(model)
    if path.is_dir():
        if (file := read_policy_file(path)) is not None:
            prints = [model_fingerprint(one) for one in (file.base, *file.aligned)]
            return combined_fingerprint(file.kind, prints, file.settings)
        return f"sha256:{_hash_folder(path)}"
    from transformers import AutoConfig

    require_model(model)
    try:
        commit = getattr(AutoConfig.from_pretrained(str(model)), "_commit_hash", None)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the model's config.json cannot be read ({first_line(error)})",
            where=str(model),
            hint="Give a model folder or a hub name",
        ) from error
    return f"hub:{model}@{commit or 'unknown'}"


def combined_fingerprint(kind: str, fingerprints: Sequence[str], settings: Mapping[str, Any]) -> str:
    """Identity of a policy that is made of others: its kind, theirs, and what else decides its rollouts."""
    # What a fit predicted, and what it was made for, decides no rollout.
    decides = {
        name: {inner: v for inner, v in value.items() if inner not in _OF_THE_FIT} if name == "reshaping" else value
        for name, value in settings.items()
    }
    content = json.dumps([list(fingerprints), decides], sort_keys=True)
    return f"{kind}:{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def tokenizer_files_fingerprint(model: str | Path) -> str:
    """Identity of the tokenizer, template and code files in a model's folder; "" for a hub name, whose commit tells."""
    digest = hashlib.sha256()
    folder = Path(model)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        of_tokenizer = path.name in _TOKENIZER_FILES or path.suffix in (".model", ".jinja", ".tiktoken", ".py")
        if of_tokenizer and path.is_file():
            digest.update(
                f"{path.relative_to(folder).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode()
            )
    return digest.hexdigest()[:32] if folder.is_dir() else ""


def _hash_folder(folder: Path) -> str:
    weights = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    if not weights:
        raise InputError("there are no model weights in this folder", where=str(folder),
                         hint="A model folder holds model.safetensors or adapter_model.safetensors")  # fmt: skip
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    for name in ("config.json", ADAPTER):
        if (folder / name).exists():
            config = read_object(folder / name, "Copy this model folder again")
            for key in _NOT_THE_MODEL:
                config.pop(key, None)
            digest.update(json.dumps(config, sort_keys=True).encode())
    if (folder / ADAPTER).exists():
        digest.update(model_fingerprint(adapter_base(folder)).encode())
    return digest.hexdigest()[:32]


def model_name(model: str | Path) -> str:
    """What to call a model in tables: its folder's name, of `NAME/model` the first; a hub name as it is."""
    path = Path(model)
    if not path.exists():
        return str(model)
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Identity of a tokenizer: its vocabulary and rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Set by whoever encoded last; not a property of the tokenizer.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = json.dumps([rules, special, getattr(tokenizer, "chat_template", None)], sort_keys=True)
    return f"sha256:{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
