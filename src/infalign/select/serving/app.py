"""`infalign serve`: an inference-time procedure behind the OpenAI protocol.

It needs no torch of its own: the model, if it runs in this process, comes with the decoder.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign._io.http import EndpointError, RequestRefusedError
from infalign._io.threads import time_left, time_limit
from infalign._io.wording import counted
from infalign.errors import InfalignError, InputError
from infalign.rollouts.prompts import Prompt
from infalign.select.decoder import Decoded, Decoder
from infalign.select.serving.batcher import Batcher
from infalign.select.serving.protocol import (
    AnswerMessage,
    Asked,
    ChatAnswer,
    ChatAsked,
    ChatChoice,
    ErrorAnswer,
    Health,
    HowChosen,
    ServedModel,
    ServedModels,
    TextAnswer,
    TextAsked,
    TextChoice,
    Usage,
)
from infalign.select.serving.web import FastAPI, HTTPException, Request, make_app, require_key, while_connected


@dataclass(frozen=True)
class Served:
    """What is served, and how patiently.

    Attributes:
        decoder: Performs the procedure.
        name: The model's name for clients.
        max_new_tokens: The decoder's longest response.
        temperature: The decoder's.
        top_p: The decoder's.
        count_prompt: Tokens of a prompt; raises InputError for one that the model cannot be shown. None where nobody
            knows.
        known: The calibration's prompts by their ids, whose columns go to the reward.
        capacity: Most requests taken in and not finished; more are answered with 429.
        max_batch: Most requests decoded together.
        workers: Batches decoded at the same time.
        timeout: Seconds until a request is given up.
        max_body: Bytes of the largest request.
        key: What clients must send as a bearer token; None for an open server.
    """

    decoder: Decoder
    name: str
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    count_prompt: Callable[[Prompt], int] | None = None
    known: Mapping[str, Prompt] = field(default_factory=dict)
    capacity: int = 128
    max_batch: int = 1
    workers: int = 1
    timeout: float = 120.0
    max_body: int = 4 << 20
    key: str | None = None


class ProcedureServer:
    """The application, and the queue behind it.

    Args:
        served: What is served.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._started = int(time.time())
        self._upstream_fails = self._late = False
        self._stopping = False
        self._batcher = Batcher[Prompt, Decoded](
            self._decode, capacity=served.capacity, max_batch=served.max_batch, workers=served.workers
        )
        self.app = self._make_app()

    @property
    def num_open(self) -> int:
        """Requests taken in and not finished."""
        return self._batcher.num_open

    def stop(self) -> None:
        """Take in nothing more; what was taken in is finished."""
        self._stopping = True
        self._batcher.stop()

    def _make_app(self) -> FastAPI:
        app = make_app("infalign serve", max_body=self._served.max_body)
        if self._served.key is not None:
            require_key(app, self._served.key, under="/v1/")
        errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}

        @app.post("/v1/chat/completions", responses=errors)
        async def chat_completions(asked: ChatAsked, request: Request) -> ChatAnswer:
            """Answer messages by the procedure."""
            prompt = Prompt([message.plain() for message in asked.messages])
            decoded, common = await self._answer(asked, prompt, request)
            message = AnswerMessage(content=decoded.chosen.text)
            choice = ChatChoice(message=message, finish_reason=_reason(decoded))
            return ChatAnswer(id=f"chatcmpl-{uuid.uuid4().hex}", choices=[choice], **common)

        @app.post("/v1/completions", responses=errors)
        async def completions(asked: TextAsked, request: Request) -> TextAnswer:
            """Continue a text by the procedure."""
            decoded, common = await self._answer(asked, Prompt(asked.prompt), request)
            choice = TextChoice(text=decoded.chosen.text, finish_reason=_reason(decoded))
            return TextAnswer(id=f"cmpl-{uuid.uuid4().hex}", choices=[choice], **common)

        @app.get("/v1/models", responses=errors)
        async def models() -> ServedModels:
            """What can be asked."""
            return ServedModels(data=[self._model()])

        @app.get("/v1/models/{name:path}", responses=errors)
        async def model(name: str) -> ServedModel:
            """The served model, by its name."""
            self._require_name(name)
            return self._model()

        @app.get("/health")
        async def health() -> Health:
            """How busy the server is."""
            queue = self._batcher
            late = self._late or queue.longest_under_way > self._served.timeout
            status = "late" if late else "ok"
            status = "stopping" if self._stopping else "upstream does not answer" if self._upstream_fails else status
            return Health(status=status, open=queue.num_open, waiting=queue.num_waiting, capacity=queue.capacity)

        return app

    async def _answer(self, asked: Asked, prompt: Prompt, request: Request) -> tuple[Decoded, dict[str, Any]]:
        """The decoded prompt, and what answers of both kinds have in common."""
        self._require_name(asked.model)
        self._require_settings(asked)
        texts = [prompt.prompt] if isinstance(prompt.prompt, str) else [one["content"] for one in prompt.prompt]
        if not any(text.strip() for text in texts):
            raise InputError("the prompt is empty", where="request", hint="Ask something")
        count = self._served.count_prompt
        prompt_tokens = None if count is None else count(prompt)
        decoded = await while_connected(request, self._batcher.do(prompt, timeout=self._served.timeout))
        usage = None
        if prompt_tokens is not None and decoded.num_tokens is not None:
            total = prompt_tokens + decoded.num_tokens
            usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=decoded.num_tokens, total_tokens=total)
        how = HowChosen(
            procedure=decoded.procedure.label,
            num_candidates=len(decoded.candidates),
            num_tokens=decoded.num_tokens,
            answer_tokens=decoded.chosen.num_tokens,
            reward=decoded.chosen.reward,
            calibrated_reward=decoded.chosen.calibrated_reward,
            seconds=decoded.seconds,
        )
        return decoded, {"created": int(time.time()), "model": self._served.name, "usage": usage, "infalign": how}

    def _decode(self, prompts: Sequence[Prompt]) -> Sequence[Decoded | InfalignError]:
        """Decode a batch; servers that are asked for it have as long as the clients wait, and no longer."""
        with time_limit(self._served.timeout):
            answers = self._decode_in_time(prompts)
            self._late = time_left() <= 0.0
        failed = [
            isinstance(answer, EndpointError) and not isinstance(answer, RequestRefusedError) for answer in answers
        ]
        self._upstream_fails = any(failed)
        return answers

    def _decode_in_time(self, prompts: Sequence[Prompt]) -> Sequence[Decoded | InfalignError]:
        # A reward gets the columns that all prompts of a call have: those of a run and others must not share one.
        calls: dict[bool, list[int]] = {}
        for at, prompt in enumerate(prompts):
            calls.setdefault(prompt.id in self._served.known, []).append(at)
        answers: list[Any] = [None] * len(prompts)
        for rows in calls.values():
            asked = [self._served.known.get(prompts[at].id, prompts[at]) for at in rows]
            for at, answer in zip(rows, self._served.decoder.decode_each(asked), strict=True):
                answers[at] = answer
        return answers

    def _require_name(self, name: str) -> None:
        if name != self._served.name:
            raise HTTPException(404, f"there is no model {name!r} here; there is {self._served.name!r}")

    def _require_settings(self, asked: Asked) -> None:
        """Refuse settings that would make it another procedure than the one that is served."""
        for name, wanted, is_served in (
            ("temperature", asked.temperature, self._served.temperature),
            ("top_p", asked.top_p, self._served.top_p),
        ):
            if wanted is not None and wanted != is_served:
                raise InputError(
                    f"{name} is {wanted:g}, but candidates are drawn with {is_served:g}",
                    where="request",
                    hint=f"Leave {name} out, or give {is_served:g}",
                )
        limit = self._served.max_new_tokens
        if asked.most_tokens is not None and asked.most_tokens < limit:
            raise InputError(
                f"at most {counted(asked.most_tokens, 'token is', 'tokens are')} wanted, but candidates of up "
                f"to {limit} are compared",
                where="request",
                hint=f"Leave the limit out, or give at least {limit}",
            )

    def _model(self) -> ServedModel:
        return ServedModel(id=self._served.name, created=self._started)


def _reason(decoded: Decoded) -> Any:
    return "length" if decoded.chosen.finish_reason == "length" else "stop"
