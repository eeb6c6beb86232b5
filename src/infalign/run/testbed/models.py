"""Tiny models trained from scratch through TRL: a reference policy on examples, a reward model on pairs.

Both are saved as ordinary Hugging Face folders (safetensors and tokenizer) with their measurements in `metrics.json`.
A folder appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from infalign._io.files import new_folder, write_json
from infalign.errors import InputError, StorageError, TrainingError
from infalign.run.testbed.examples import Example, Pair
from infalign.run.testbed.quiet import quiet
from infalign.run.testbed.tokenizer import train_tokenizer

METRICS_FILE = "metrics.json"
IGNORED = -100  # the label that PyTorch's cross-entropy leaves out

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and a few words on how it goes."""


@dataclass(frozen=True)
class ReferenceSpec:
    """Size and training of a reference policy.

    Args:
        vocab_size: Tokens in the vocabulary, the 256 bytes and two special tokens included.
        hidden_size: Width of the model.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        epochs: Passes over the training examples.
        batch_size: Examples per step.
        learning_rate: Peak rate (linear warm-up over a twentieth of the steps, then a cosine).
        max_length: Tokens of prompt, completion and end token together; also the model's context.
    """

    vocab_size: int = 1024
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 5e-3
    max_length: int = 96


@dataclass(frozen=True)
class RewardSpec:
    """Training of a reward model, and its size if that is not the reference's.

    Args:
        epochs: Passes over the training pairs.
        batch_size: Pairs per step.
        learning_rate: Peak rate (linear warm-up over a twentieth of the steps, then a cosine).
        max_length: Longest text in tokens; of a longer one the end is kept.
        hidden_size: Width of a body trained from scratch; None starts from the reference's weights.
        num_layers: Blocks of a body trained from scratch.
        num_heads: Attention heads of a body trained from scratch.
    """

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 1e-3
    max_length: int = 96
    hidden_size: int | None = None
    num_layers: int = 2
    num_heads: int = 4


DOCSTRING_REFERENCE = ReferenceSpec()
"""For `docstring_examples`; two more epochs did not lower the held-out loss."""

DOCSTRING_REWARD = RewardSpec()
"""For `preference_pairs` with three pairs per example, each seen once."""


@dataclass(frozen=True)
class ReferenceResult:
    """What training a reference policy gave.

    Args:
        path: The Hugging Face folder.
        parameters: Number of weights.
        train_examples: Examples trained on.
        held_out_examples: Examples measured on.
        truncated: Examples, of either part, that `max_length` cut.
        held_out_loss: Nats per completion token (end token included) on held-out examples; None if there are none.
        held_out_perplexity: exp(`held_out_loss`).
    """

    path: Path
    parameters: int
    train_examples: int
    held_out_examples: int
    truncated: int
    held_out_loss: float | None
    held_out_perplexity: float | None


@dataclass(frozen=True)
class RewardResult:
    """What training a reward model gave.

    Args:
        path: The Hugging Face folder.
        parameters: Number of weights.
        train_pairs: Pairs trained on.
        held_out_pairs: Pairs measured on.
        truncated: Pairs, of either part, of which a text was longer than `max_length`.
        held_out_accuracy: Share of held-out pairs ordered rightly, equal scores counting one half; None without any.
        held_out_accuracy_by_kind: The same for each kind of wrong answer.
    """

    path: Path
    parameters: int
    train_pairs: int
    held_out_pairs: int
    truncated: int
    held_out_accuracy: float | None
    held_out_accuracy_by_kind: dict[str, float]


def train_reference(
    examples: Sequence[Example],
    out_dir: str | os.PathLike[str],
    *,
    spec: ReferenceSpec = DOCSTRING_REFERENCE,
    seed: int = 0,
    progress: Progress | None = None,
) -> ReferenceResult:
    """Train a Llama and its tokenizer from scratch with TRL's `SFTTrainer`.

    The loss is on completions and the end token alone. Prompt and completion are tokenized apart, exactly as they meet
    when the model generates. An example longer than `spec.max_length` keeps the end of its prompt (at least half of
    the room) and the beginning of its completion; a completion that was cut gets no end token.

    Args:
        examples: Examples; those not held out are trained on, the others measured on.
        out_dir: The Hugging Face folder to make; one made here earlier is replaced.
        spec: Size and training.
        seed: Seed of the initial weights and the order of the examples.
        progress: Told about every step.

    Returns:
        Held-out measurements, also written to `metrics.json`.

    Raises:
        InputError: If there is nothing to train on.
        StorageError: If `out_dir` holds something else or cannot be written.
        TrainingError: If the loss is not finite.
    """
    train = [example for example in examples if not example.held_out]
    held_out = [example for example in examples if example.held_out]
    if not train:
        raise InputError("no example to train on", where="train_reference", hint="Give some that are not held out")
    with quiet(), _complete_folder(Path(out_dir)) as folder:
        tokenizer = train_tokenizer(
            (e.prompt + e.completion for e in train), spec.vocab_size, max_length=spec.max_length
        )
        model = _new_llama(
            LlamaForCausalLM, tokenizer, spec.hidden_size, spec.num_layers, spec.num_heads, spec.max_length, seed
        )
        rows = [_supervised_row(tokenizer, example, spec.max_length) for example in [*train, *held_out]]
        train_rows, held_out_rows = rows[: len(train)], rows[len(train) :]
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                **_common_arguments(folder, spec.epochs, spec.batch_size, spec.learning_rate, len(train), seed),
                max_length=None,  # cut already
            ),
            train_dataset=Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in train_rows]),
            processing_class=tokenizer,
            callbacks=[_Reporter(progress)],
        )
        _train(trainer)
        model.eval()
        loss = _held_out_loss(model, held_out_rows, tokenizer.pad_token_id) if held_out_rows else None
        result = ReferenceResult(
            path=Path(out_dir),
            parameters=model.num_parameters(),
            train_examples=len(train),
            held_out_examples=len(held_out),
            truncated=sum(row["truncated"] for row in rows),
            held_out_loss=loss,
            held_out_perplexity=None if loss is None else math.exp(loss),
        )
        _save(model, tokenizer, folder, result, spec, seed)
    return result


def train_reward_model(
    pairs: Sequence[Pair],
    reference_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    spec: RewardSpec = DOCSTRING_REWARD,
    seed: int = 0,
    progress: Progress | None = None,
) -> RewardResult:
    """Train a reward model with TRL's `RewardTrainer`, starting from the reference.

    The score of a completion is the single logit for the text prompt + completion, tokenized in one piece, without an
    end token: the same text that TRL's online trainers hand to a reward model. Of longer texts the last
    `spec.max_length` tokens count (the tokenizer is saved with `truncation_side="left"`).

    Args:
        pairs: Preferences; those not held out are trained on, the others measured on.
        reference_dir: Folder of the reference, for its tokenizer and (unless `spec` has a size) its body.
        out_dir: The Hugging Face folder to make; one made here earlier is replaced.
        spec: Training, and size if not the reference's.
        seed: Seed of the new weights and the order of the pairs.
        progress: Told about every step.

    Returns:
        Held-out accuracies, also written to `metrics.json`.

    Raises:
        InputError: If there is nothing to train on.
        StorageError: If `out_dir` holds something else or cannot be written, or `reference_dir` cannot be read.
        TrainingError: If the loss is not finite.
    """
    train = [pair for pair in pairs if not pair.held_out]
    held_out = [pair for pair in pairs if pair.held_out]
    if not train:
        raise InputError("no pair to train on", where="train_reward_model", hint="Give some that are not held out")
    if not (Path(reference_dir) / "config.json").is_file():
        raise StorageError("not a model folder", where=str(reference_dir), hint="Train the reference first")
    with quiet(), _complete_folder(Path(out_dir)) as folder:
        tokenizer = AutoTokenizer.from_pretrained(reference_dir)
        tokenizer.model_max_length = spec.max_length
        tokenizer.truncation_side = "left"
        if spec.hidden_size is None:
            with _seeded(seed):
                model = AutoModelForSequenceClassification.from_pretrained(reference_dir, num_labels=1)
            model.config.pad_token_id = tokenizer.pad_token_id
        else:
            model = _new_llama(
                LlamaForSequenceClassification,
                tokenizer,
                spec.hidden_size,
                spec.num_layers,
                spec.num_heads,
                spec.max_length,
                seed,
            )
        rows = [_pair_row(tokenizer, pair, spec.max_length) for pair in [*train, *held_out]]
        train_rows, held_out_rows = rows[: len(train)], rows[len(train) :]
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                **_common_arguments(folder, spec.epochs, spec.batch_size, spec.learning_rate, len(train), seed),
                remove_unused_columns=False,  # "length" is for the sampler
                max_length=None,  # cut already: the trainer would drop what is too long without a word
            ),
            train_dataset=Dataset.from_list(
                [{k: row[k] for k in ("chosen_ids", "rejected_ids", "length")} for row in train_rows]
            ),
            processing_class=tokenizer,
            callbacks=[_Reporter(progress)],
        )
        _train(trainer)
        model.eval()
        accuracy, by_kind = _held_out_accuracy(model, held_out_rows, [p.kind for p in held_out], tokenizer.pad_token_id)
        result = RewardResult(
            path=Path(out_dir),
            parameters=model.num_parameters(),
            train_pairs=len(train),
            held_out_pairs=len(held_out),
            truncated=sum(row["truncated"] for row in rows),
            held_out_accuracy=accuracy,
            held_out_accuracy_by_kind=by_kind,
        )
        _save(model, tokenizer, folder, result, spec, seed)
    return result


def _supervised_row(tokenizer: PreTrainedTokenizerFast, example: Example, max_length: int) -> dict[str, Any]:
    prompt_ids = tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    completion_ids = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept_prompt = prompt_ids[-max(max_length - len(completion_ids), max_length // 2) :]
    kept_completion = completion_ids[: max_length - len(kept_prompt)]
    return {
        "input_ids": kept_prompt + kept_completion,
        "labels": [IGNORED] * len(kept_prompt) + kept_completion,
        "truncated": len(kept_prompt) + len(kept_completion) < len(prompt_ids) + len(completion_ids),
    }


def _pair_row(tokenizer: Any, pair: Pair, max_length: int) -> dict[str, Any]:
    chosen_ids = tokenizer(pair.prompt + pair.chosen, add_special_tokens=False)["input_ids"]
    rejected_ids = tokenizer(pair.prompt + pair.rejected, add_special_tokens=False)["input_ids"]
    return {
        "chosen_ids": chosen_ids[-max_length:],
        "rejected_ids": rejected_ids[-max_length:],
        "length": max(len(chosen_ids), len(rejected_ids)),  # what the trainer groups by
        "truncated": max(len(chosen_ids), len(rejected_ids)) > max_length,
    }


def _new_llama(
    kind: type[Any], tokenizer: Any, hidden: int, layers: int, heads: int, max_length: int, seed: int
) -> Any:
    if hidden % heads:
        raise InputError(f"num_heads ({heads}) does not divide hidden_size ({hidden})", where="spec")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        initializer_range=0.5 / math.sqrt(hidden),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if kind is LlamaForSequenceClassification:
        config.num_labels = 1
    with _seeded(seed):
        return kind(config)


def _common_arguments(
    folder: Path, epochs: int, batch_size: int, learning_rate: float, rows: int, seed: int
) -> dict[str, Any]:
    """The settings that both trainers share; TRL's own defaults (bf16, gradient checkpointing) are for large models."""
    steps = epochs * math.ceil(rows / batch_size)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "weight_decay": 0.01,
        "bf16": False,
        "gradient_checkpointing": None,  # off; False is off too, but newer transformers warn of the old name
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataset_num_proc": None,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length",  # less padding: half the work for short texts
        "seed": seed,
    }


class _Reporter(TrainerCallback):
    """Passes the trainer's steps on to a progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, f"step {state.global_step} of {state.max_steps}")


def _train(trainer: SFTTrainer | RewardTrainer) -> None:
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    if not math.isfinite(loss):
        raise TrainingError(f"the training loss is {loss}", where="spec.learning_rate", hint="Lower it")


@torch.no_grad()
def _held_out_loss(model: Any, rows: list[dict[str, Any]], pad_id: Any, batch_size: int = 64) -> float:
    """Nats per completion token, each token weighing the same."""
    total, count = 0.0, 0
    for batch in _batches(rows, batch_size):
        ids = _padded([row["input_ids"] for row in batch], pad_id).to(model.device)
        labels = _padded([row["labels"] for row in batch], IGNORED).to(model.device)
        logits = model(input_ids=ids, attention_mask=_padded_mask(batch, "input_ids").to(model.device)).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / count


@torch.no_grad()
def _held_out_accuracy(
    model: Any, rows: list[dict[str, Any]], kinds: list[str], pad_id: int, batch_size: int = 64
) -> tuple[float | None, dict[str, float]]:
    wins: list[float] = []
    for batch in _batches(rows, batch_size):
        chosen, rejected = (
            model(
                input_ids=_padded([row[name] for row in batch], pad_id).to(model.device),
                attention_mask=_padded_mask(batch, name).to(model.device),
            ).logits[:, 0]
            for name in ("chosen_ids", "rejected_ids")
        )
        wins += ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).tolist()
    if not wins:
        return None, {}
    totals = Counter(kinds)
    by_kind = {
        kind: sum(w for w, k in zip(wins, kinds, strict=True) if k == kind) / totals[kind] for kind in sorted(totals)
    }
    return sum(wins) / len(wins), by_kind


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _padded(sequences: list[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=value)


def _padded_mask(batch: list[dict[str, Any]], name: str) -> torch.Tensor:
    return _padded([[1] * len(row[name]) for row in batch], 0)


def _save(model: Any, tokenizer: Any, folder: Path, result: Any, spec: Any, seed: int) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    metrics = asdict(result) | {"spec": asdict(spec), "seed": seed}
    del metrics["path"]
    write_json(folder / METRICS_FILE, metrics)


@contextlib.contextmanager
def _complete_folder(out_dir: Path) -> Iterator[Path]:
    """A temporary sibling that takes the name `out_dir` only if the block succeeds."""
    ours = not out_dir.exists() or (out_dir / METRICS_FILE).is_file() or not any(out_dir.iterdir())
    if not ours:
        raise StorageError("the folder holds something else", where=str(out_dir), hint="Give a new or an empty folder")
    with new_folder(out_dir) as folder:
        yield folder


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
