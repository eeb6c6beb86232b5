"""The OpenAI protocol, as far as a procedure can keep it: what it is asked, what it refuses, what it answers.

A procedure draws its candidates in one fixed way, so a request cannot change how they are drawn or how many are
returned. A field that would is refused, with the reason; one that would not (`user`, `metadata`, …) is accepted and
not used; one that is not known is refused, for nobody can say which kind it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from infalign.rollouts.prompts import Message

LONGEST_TEXT = 1 << 20
MOST_MESSAGES = 1024


class Fixed:
    """A field that may only be absent, null or one of these values.

    Args:
        *allowed: The values.
        why: Why nothing else, as a clause.
    """

    def __init__(self, *allowed: Any, why: str) -> None:
        self._allowed = allowed
        self._why = why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [*self._allowed, None]}

    def _check(self, value: Any) -> Any:
        # False equals 0 to Python, but not to a client.
        if value is None or any(isinstance(value, bool) == isinstance(one, bool) and value == one
                                for one in self._allowed):  # fmt: skip
            return value
        hint = "leave it out" + "".join(f" or give {one!r}" for one in self._allowed[:1])
        raise ValueError(f"{self._why}; {hint}")


Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Count = Annotated[int, Field(ge=1, le=1 << 31)]

_ONE = "the procedure draws several candidates and returns one of them"
_WHOLE = "an answer is chosen among whole candidates, so it cannot be streamed while it is drawn"
_AS_IT_IS = "candidates are drawn from the model as it is"
_NO_LOGPROBS = "the log-probabilities of a chosen candidate are not those of the answer"
_FRESH = "every request draws afresh"
_NO_TOOLS = "tools are not supported"
_TEXT_ONLY = "only plain text is supported"
_UNUSED = "accepted and not used: it does not change the answer"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Asked(_Strict):
    """What requests for messages and for text have in common.

    Attributes:
        model: The served name.
        temperature: Null, or that of the server.
        top_p: As `temperature`.
        max_tokens: Null, or at least the server's own limit.
    """

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    n: Annotated[Any, Fixed(1, why=_ONE)] = None
    stream: Annotated[Any, Fixed(False, why=_WHOLE)] = None
    stream_options: Annotated[Any, Fixed(why=_WHOLE)] = None
    stop: Annotated[Any, Fixed([], why="candidates end where the model ends them")] = None
    seed: Annotated[Any, Fixed(why=_FRESH)] = None
    presence_penalty: Annotated[Any, Fixed(0, why=_AS_IT_IS)] = None
    frequency_penalty: Annotated[Any, Fixed(0, why=_AS_IT_IS)] = None
    logit_bias: Annotated[Any, Fixed({}, why=_AS_IT_IS)] = None
    user: str | None = Field(None, description=_UNUSED)
    metadata: dict[str, Any] | None = Field(None, description=_UNUSED)
    store: bool | None = Field(None, description=_UNUSED)
    service_tier: str | None = Field(None, description=_UNUSED)
    safety_identifier: str | None = Field(None, description=_UNUSED)
    prompt_cache_key: str | None = Field(None, description=_UNUSED)
    prompt_cache_retention: str | None = Field(None, description=_UNUSED)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that the client wants."""
        return self.max_tokens


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One message. The fields that must be null let an answer be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_MESSAGES)]
    name: Annotated[Any, Fixed(why="chat templates have no place for it")] = None
    refusal: Annotated[Any, Fixed(why=_TEXT_ONLY)] = None
    annotations: Annotated[Any, Fixed([], why=_TEXT_ONLY)] = None
    audio: Annotated[Any, Fixed(why=_TEXT_ONLY)] = None
    function_call: Annotated[Any, Fixed(why=_NO_TOOLS)] = None
    tool_calls: Annotated[Any, Fixed([], why=_NO_TOOLS)] = None

    def plain(self) -> Message:
        """Role and text; the parts of a text are put one under the other."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "\n".join(parts)}


class ChatAsked(Asked):
    """A request for an answer to messages."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: Annotated[Any, Fixed(False, why=_NO_LOGPROBS)] = None
    top_logprobs: Annotated[Any, Fixed(0, why=_NO_LOGPROBS)] = None
    tools: Annotated[Any, Fixed([], why=_NO_TOOLS)] = None
    tool_choice: Annotated[Any, Fixed("none", "auto", why=_NO_TOOLS)] = None
    parallel_tool_calls: bool | None = Field(None, description=_UNUSED)
    functions: Annotated[Any, Fixed([], why=_NO_TOOLS)] = None
    function_call: Annotated[Any, Fixed("none", "auto", why=_NO_TOOLS)] = None
    response_format: Annotated[Any, Fixed({"type": "text"}, why=_TEXT_ONLY)] = None
    modalities: Annotated[Any, Fixed(["text"], why=_TEXT_ONLY)] = None

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that the client wants."""
        return min(
            (limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None), default=None
        )


class TextAsked(Asked):
    """A request for the continuation of a text."""

    prompt: Text
    logprobs: Annotated[Any, Fixed(why=_NO_LOGPROBS)] = None
    best_of: Annotated[Any, Fixed(1, why="the procedure itself decides how many candidates are drawn")] = None
    echo: Annotated[Any, Fixed(False, why="the answer is the response alone")] = None
    suffix: Annotated[Any, Fixed("", why="a response continues its prompt")] = None


class Usage(BaseModel):
    """Tokens.

    Attributes:
        prompt_tokens: Of the prompt, once.
        completion_tokens: Generated for *all* candidates: what the answer cost.
        total_tokens: Their sum.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class HowChosen(BaseModel):
    """How an answer came about.

    Attributes:
        procedure: The procedure in words, such as `Best-of-8`; of a mixture the part that was drawn.
        num_candidates: Responses drawn.
        num_tokens: Tokens generated for all of them; null where the upstream server does not tell.
        answer_tokens: Tokens of the answer alone; null where the upstream server does not tell.
        reward: Raw reward of the answer; null for a procedure without a reward.
        calibrated_reward: Its quantile among the reference policy's own responses (M5); null for a prompt that is not
            in the calibration.
        seconds: From the start of drawing to the choice.
    """

    procedure: str
    num_candidates: int
    num_tokens: int | None
    answer_tokens: int | None
    reward: float | None
    calibrated_reward: float | None
    seconds: float


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class TextChoice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None
    infalign: HowChosen


class ChatAnswer(_Answer):
    """The answer to messages. `usage` is null where the upstream server does not count tokens."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class TextAnswer(_Answer):
    """The continuation of a text. `usage` is null where the upstream server does not count tokens."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


class ServedModel(BaseModel):
    """A model that can be asked: the procedure behind a name."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["infalign"] = "infalign"


class ServedModels(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ErrorInside(BaseModel):
    """What was wrong, and a hint."""

    message: str
    type: str
    param: None
    code: None


class ErrorAnswer(BaseModel):
    """Every error, from 400 to 503."""

    error: ErrorInside


class Health(BaseModel):
    """How busy the server is.

    Attributes:
        status: `ok`; `stopping`; `upstream does not answer` if the last request upstream failed; `late` if the last one
            was not done in time, or one under way will not be.
        open: Requests taken in and not finished.
        waiting: Those of them that nothing works on yet.
        capacity: Most open requests.
    """

    status: Literal["ok", "stopping", "upstream does not answer", "late"]
    open: int
    waiting: int
    capacity: int
