"""What scores a response: a sequence-classification model or a Python function, behind one interface."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import math
import numbers
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.http import Endpoint, EndpointError, known_keys
from infalign._io.outside import in_short
from infalign._io.threads import each_in_threads, in_a_thread
from infalign._io.wording import counted
from infalign.errors import InputError, RewardError
from infalign.rewards.function_key import function_digest, name_of, told
from infalign.rewards.user_code import extend_path, in_the_way
from infalign.rollouts.key import model_fingerprint, model_name, tokenizer_files_fingerprint
from infalign.rollouts.prompts import Message, PromptContent
from infalign.rollouts.rendering import rendered_ids
from infalign.rollouts.texts import shown

Float = NDArray[np.float64]

NUMBER_OR_NONE = (
    "Return a finite number, or None for a response that cannot be scored; in training every response needs a number"
)


@dataclass(frozen=True)
class Scores:
    """Rewards of B responses.

    Attributes:
        rewards: Shape (B,), or (B, M) from several sources together; NaN marks a response that could not be scored.
        errors: Why not, shape (B,); None where it could.
    """

    rewards: Float
    errors: list[str | None]


class RewardSource(ABC):
    """Scores responses. As text (`str`) it is the name that people read, which two sources may share.

    Attributes:
        key: Names the source; a source that would score otherwise has another key.
        description: What it is, as plain data, kept beside its rewards.
        concurrent: Whether several threads may score at the same time.
    """

    key: str
    description: dict[str, Any]
    concurrent: bool = False

    @abstractmethod
    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """Score B responses, saying of each that could not be scored why.

        The sources here bring both into the form of `texts.shown` first; one of your own does that by calling it.

        Args:
            prompts: B prompts, as text or chat messages.
            completions: B responses, in either form.
            **columns: Further columns of the data, each with B values.

        Raises:
            RewardError: The source gave something that is not one number per response.
        """

    def score(self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any) -> Float:
        """Rewards of B responses, shape (B,); NaN where a response could not be scored. Errors as in `score_rows`."""
        return self.score_rows(prompts, completions, **columns).rewards

    def render_at(self, moment: str | None) -> None:  # noqa: B027  most sources render nothing
        """Let chat templates with a date in them be told this moment (`Prompt.rendered_at`)."""

    def __str__(self) -> str:
        return self.key


class FunctionReward(RewardSource):
    """A Python function `f(prompts=…, completions=…, **columns) -> list of float`, as TRL's trainers take it.

    Of text prompts, prompts and completions are strings; of chat prompts a prompt is its list of messages and a
    completion `[{"role": "assistant", "content": …}]`. The function is shown the same at every stage.

    It may be async. It gets the columns that it has parameters for (all of them if it takes `**kwargs`). None as a
    reward marks that response as unscored. If the function raises, its rows are tried one by one and those that raise
    are unscored.

    Args:
        function: The function, or `"module:function"`.
        key: Names the source; by default the function's name and a hash of its code and state (`identity.py`), so that
            a function that was changed, or made with other arguments, scores anew.

    Raises:
        InputError: There is no such module or function, or it has a state that has no form that is the same in every
            process, and no key is given.
    """

    def __init__(self, function: str | Callable[..., Any], *, key: str | None = None) -> None:
        self._function = import_function(function) if isinstance(function, str) else function
        name = function if isinstance(function, str) else name_of(self._function)
        digest = function_digest(function, self._function, key)
        self.key = key or f"{name}@{digest}"
        self._name = name if key is None else key
        self.description = {"kind": "function", "function": name, "source": digest}
        try:
            self._signature = inspect.signature(self._function)
        except (TypeError, ValueError) as error:
            raise InputError("it does not tell its parameters", where=f"reward function {name}",
                             hint="Write a Python function around it") from error  # fmt: skip
        parameters = self._signature.parameters
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes = set(parameters)

    def __str__(self) -> str:
        return self._name

    def require_columns(self, names: Sequence[str]) -> None:
        """Make sure, without calling it, that the function can be called with these columns.

        Raises:
            InputError: It needs another one, or takes no `prompts` or `completions`.
        """
        given = ["prompts", "completions", *(name for name in names if self._takes_all or name in self._takes)]
        try:
            self._signature.bind(**dict.fromkeys(given))
        except TypeError as error:
            known = ", ".join(names)
            raise InputError(f"it cannot be called with prompts, completions and the prompts' columns ({error})",
                             where=f"reward function {self.description['function']}",
                             hint=f"Columns that all prompts have: {known}") from error  # fmt: skip

    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """As `RewardSource.score_rows`.

        Raises:
            RewardError: The function gave another number of rewards, or one that is NaN, infinite or not a number.
        """
        prompts, completions = shown(prompts, completions)
        kept = {name: value for name, value in columns.items() if self._takes_all or name in self._takes}
        prompt_ids = list(columns.get("prompt_id", ()))
        try:
            return check_scores(self._call(prompts, completions, kept), len(completions), 0, str(self), prompt_ids)
        except RewardError:
            raise
        except Exception as error:
            if len(completions) == 1:
                return Scores(np.array([np.nan]), [told(error)])
        rewards = np.empty(len(completions))
        errors: list[str | None] = []
        for row in range(len(completions)):
            one = {
                name: [value[row]] if isinstance(value, (list, tuple)) and len(value) == len(completions) else value
                for name, value in kept.items()
            }
            try:
                values = self._call(prompts[row : row + 1], completions[row : row + 1], one)
                scored = check_scores(values, 1, row, str(self), prompt_ids and prompt_ids[row : row + 1])
                rewards[row] = scored.rewards[0]
                errors.append(scored.errors[0])
            except RewardError:
                raise
            except Exception as error:
                rewards[row] = np.nan
                errors.append(told(error))
        return Scores(rewards, errors)

    def call_once(self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]) -> Scores:
        """As `score_rows`, for rows in just this form; it raises whatever the function raises."""
        kept = {name: value for name, value in columns.items() if self._takes_all or name in self._takes}
        return check_scores(self._call(prompts, completions, kept), len(completions), 0, str(self))

    def _call(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], columns: dict[str, Any]
    ) -> Any:
        try:
            result = self._function(prompts=list(prompts), completions=list(completions), **columns)
            return _wait_for(result) if inspect.isawaitable(result) else result
        except SystemExit as error:
            raise RewardError("it ended the program", where=str(self), hint="Raise an error instead") from error


def check_scores(
    values: Any, count: int, first_row: int, where: str, prompt_ids: Sequence[str] | None = None
) -> Scores:
    """One finite number or None per response, or a RewardError that names the row, and its prompt where known."""
    try:
        listed = values.tolist() if hasattr(values, "tolist") else list(values)
    except TypeError as error:
        raise RewardError(f"it returned a {type(values).__name__}, not a list", where=where,
                          hint="Return one number per completion") from error  # fmt: skip
    if len(listed) != count:
        raise RewardError(f"it returned {counted(len(listed), 'reward')} for "
                          f"{counted(count, 'completion')}", where=where,
                          hint="Return one number per completion")  # fmt: skip
    rewards = np.empty(count)
    errors: list[str | None] = [None] * count
    for row, value in enumerate(listed):
        at = f"row {first_row + row}" + (f", to prompt {prompt_ids[row]}" if prompt_ids else "")
        value = value.item() if getattr(value, "shape", None) == () else value  # a NumPy or torch scalar
        if value is None:
            rewards[row], errors[row] = np.nan, "it returned no reward"
        elif not isinstance(value, numbers.Real):
            raise RewardError(f"{at}: the reward is {reprlib.repr(value)}, not a number", where=where,
                              hint=NUMBER_OR_NONE)  # fmt: skip
        else:
            try:
                rewards[row] = float(value)
            except OverflowError:
                rewards[row] = math.inf
            if not math.isfinite(rewards[row]):
                raise RewardError(f"{at}: the reward is {rewards[row]}", where=where, hint=NUMBER_OR_NONE)
    return Scores(rewards, errors)


class HTTPReward(RewardSource):
    """A server that scores: gets `{"prompts": [...], "completions": [...]}`, answers `{"rewards": [...]}`.

    Prompts and completions have the form that a `FunctionReward` is shown. A null among the rewards marks
    that response as unscored; so does a request that fails for good.

    Args:
        endpoint: The server, and how patient to be with it.
        name: Names the source; change it when the server scores otherwise, for its address does not tell.
        batch_size: Responses per request.
        concurrency: Requests under way at the same time.
    """

    concurrent = True

    def __init__(self, endpoint: Endpoint, *, name: str, batch_size: int = 64, concurrency: int = 8) -> None:
        self.endpoint = endpoint
        self._batch_size = batch_size
        self._concurrency = concurrency
        self.key = name
        self.description = {"kind": "http"}

    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """As `RewardSource.score_rows`; further columns are not sent.

        Raises:
            RewardError: The server gave another number of rewards, or one that is NaN, infinite or not a number.
        """
        prompts, completions = shown(prompts, completions)
        starts, prompt_ids = range(0, len(completions), self._batch_size), list(columns.get("prompt_id", ()))

        def one(start: int) -> Scores:
            stop = start + self._batch_size
            content = {"prompts": list(prompts[start:stop]), "completions": list(completions[start:stop])}
            count, of = len(content["completions"]), prompt_ids and prompt_ids[start:stop]
            try:
                answer = self.endpoint.post("", content, largest=(1 << 20) + 4096 * count)
            except EndpointError as error:  # without the address, which is nobody's business where rewards are stored
                said = f" ({error.said})" if error.said else ""
                return Scores(np.full(count, np.nan), [error.what + said] * count)
            return check_scores(rewards_in(answer), count, start, self.key, of)

        parts = each_in_threads(one, starts, min(self._concurrency, max(1, len(starts))))
        rewards = np.concatenate([part.rewards for part in parts]) if parts else np.empty(0)
        return Scores(rewards, [error for part in parts for error in part.errors])


def rewards_in(answer: Any) -> list[Any] | None:
    """The rewards in a server's answer; what is not a number will be shown in a message, and is cut clean of keys."""
    values = answer.get("rewards") if isinstance(answer, dict) else answer
    if not isinstance(values, list):
        return None
    known = known_keys()
    return [one if one is None or isinstance(one, int | float) else in_short(one, known) for one in values]


def import_function(name: str, kind: str = "reward function") -> Callable[..., Any]:
    """The function that `module:function` names, its module importable from the current folder.

    Args:
        name: Its name.
        kind: What it is for, in messages.

    Raises:
        InputError: There is none.
    """
    module_name, _, function_name = name.partition(":")
    hint = "Write it as module:function, with the module importable from the current folder"
    if not module_name or not function_name:
        raise InputError(f"{name!r} does not name a function", where=kind, hint=hint)
    extend_path()
    module: Any = None
    try:
        found = module = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module does when it is imported
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        reason = reason if module is None else in_the_way(module) or reason
        raise InputError(f"the function cannot be imported ({reason})", where=f"{kind} {name}", hint=hint) from error
    if not callable(found):
        raise InputError("this is not a function", where=f"{kind} {name}", hint=hint)
    return found


def _wait_for(result: Any) -> Any:
    async def finish() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    return in_a_thread(lambda: asyncio.run(finish()))  # this thread has a loop of its own, as in a notebook


class SequenceClassificationReward(RewardSource):
    """A Hugging Face sequence-classification model with one output: its logit is the reward.

    Text is scored as prompt + completion in one piece, messages as the tokenizer's chat template renders them. The
    model is loaded when first used.

    Args:
        model: Folder or hub name.
        batch_size: Responses scored at the same time.
        max_length: Longest input in tokens; longer ones lose their beginning, but for special tokens, so that the
            response is judged whole. By default, and at most, what the model can hold.
        append_end_token: Write the end token behind the text, as TRL's `RewardTrainer` does with plain text.
        trust_remote_code: Run Python code that comes with the model.
        allow_pickle: Also accept weights that are not safetensors.
        device: Where it runs; by default a GPU if there is one.

    Raises:
        InputError: There is no such model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        batch_size: int = 64,
        max_length: int | None = None,
        append_end_token: bool = False,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        device: str | None = None,
    ) -> None:
        self.path = str(model)
        self._rendered_at: str | None = None
        self.batch_size = batch_size
        self.max_length = max_length
        self.append_end_token = append_end_token
        self._trust_remote_code = trust_remote_code
        self._allow_pickle = allow_pickle
        self._device = device
        self._loaded: tuple[Any, Any] | None = None
        self.num_truncated = 0
        fingerprint = model_fingerprint(model)
        self.description = {
            "kind": "sequence-classification",
            "model": fingerprint,
            "tokenizer": tokenizer_files_fingerprint(model),
            "max_length": max_length,
            "append_end_token": append_end_token,
        }
        settings = hashlib.sha256(repr(sorted(self.description.items())).encode()).hexdigest()[:12]
        self.key = f"sequence-classification@{settings}"

    def __str__(self) -> str:
        return model_name(self.path)

    def render_at(self, moment: str | None) -> None:
        """As `RewardSource.render_at`."""
        self._rendered_at = moment

    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """As `RewardSource.score_rows`; further columns are not used.

        Raises:
            InputError: The prompts are messages and the tokenizer has no chat template.
            RewardError: The model gave NaN or infinity.
        """
        from infalign.rewards.classifier_input import cut, input_limit, scores

        model, tokenizer = self._load()
        limit = input_limit(model, tokenizer, self.max_length)
        ids = self._token_ids(tokenizer, *shown(prompts, completions))
        self.num_truncated += sum(len(one) > limit for one in ids)
        ids = [cut(tokenizer, one, limit) for one in ids]
        rewards = np.array(scores(model, tokenizer, ids, self.batch_size), dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise RewardError(f"the model gave {rewards[bad[0]]} for {counted(len(bad), 'response')}, the first "
                              f"is row {bad[0]}",
                              where=str(self), hint="Check the reward model; half precision may overflow")  # fmt: skip
        return Scores(rewards, [None] * len(rewards))

    def _token_ids(
        self, tokenizer: Any, prompts: Sequence[PromptContent], completions: Sequence[PromptContent]
    ) -> list[list[int]]:
        texts: dict[int, str] = {}
        out: list[list[int]] = [[] for _ in prompts]
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if isinstance(prompt, str) and isinstance(completion, str):
                texts[row] = prompt + completion + (tokenizer.eos_token if self.append_end_token else "")
                continue
            messages = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
            out[row] = rendered_ids(tokenizer, messages, to_answer=False, at=self._rendered_at)
        if texts:
            encoded = tokenizer(list(texts.values()), padding=False, truncation=False, verbose=False)["input_ids"]
            for row, ids in zip(texts, encoded, strict=True):
                out[row] = list(ids)
        # A model cannot read nothing: an empty text is its end token.
        empty = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
        return [ids or [empty] for ids in out]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch

            from infalign.rollouts.models import load_classifier

            model, tokenizer = load_classifier(
                self.path, trust_remote_code=self._trust_remote_code, allow_pickle=self._allow_pickle
            )
            device = self._device or ("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = model.to(device).eval(), tokenizer
        return self._loaded


def _messages(content: PromptContent, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
