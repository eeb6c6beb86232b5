"""`infalign serve-reward`: a run's transformed reward over HTTP, in OpenRLHF's remote reward protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infalign._io.threads import time_left, time_limit
from infalign._io.wording import counted
from infalign.integrations.openrlhf import PromptTexts
from infalign.integrations.trl import TrainerReward
from infalign.rollouts.models import load_tokenizer
from infalign.select.serving.batcher import Batcher
from infalign.select.serving.protocol import ErrorAnswer
from infalign.select.serving.web import FastAPI, Request, make_app, while_connected

MAX_BODY = 64 << 20
MAX_RESPONSES = 4096

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_RESPONSES)]


class RewardRequest(BaseModel):
    """What OpenRLHF posts.

    Attributes:
        query: Prompt and response as one text, with special tokens, for each of B responses.
        prompts: The B prompts as the policy was shown them.
        labels: Not used: calibration goes by the prompt.
    """

    model_config = ConfigDict(extra="ignore")

    query: Texts
    prompts: Texts
    labels: Annotated[list[Any], Field(max_length=MAX_RESPONSES)] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> RewardRequest:
        if len(self.query) != len(self.prompts):
            queries = counted(len(self.query), "query", "queries")
            raise ValueError(f"the request has {queries} and {counted(len(self.prompts), 'prompt')}; give one for each")
        return self


class RewardAnswer(BaseModel):
    """What OpenRLHF reads: B numbers under each name.

    Attributes:
        rewards: Φ_K/β in nats (M6): what the advantage is made of.
        scores: Calibrated rewards in [0, 1] (M5): what dynamic filtering looks at.
        extra_logs: `calibrated_reward` and `raw_reward`, for the trainer's log.
    """

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


@dataclass(frozen=True)
class _Asked:
    prompt_ids: list[str]
    responses: list[str]


def make_reward_app(
    reward: TrainerReward, *, capacity: int, timeout: float, batch_size: int
) -> tuple[FastAPI, Batcher]:
    """The server's application.

    Args:
        reward: What is served.
        capacity: Most requests taken in and not finished; more are answered with 429.
        timeout: Seconds until a request is given up.
        batch_size: Most requests scored together.

    Returns:
        The application, and the queue behind it, to be stopped with the server.
    """
    run = reward.run
    texts = PromptTexts(
        reward.prompts,
        load_tokenizer(run.reference, trust_remote_code=run.recipe.policy.trust_remote_code),
        run.store("reference").table(["text"])["text"].to_pylist(),
    )
    late = False

    def work(asked: Sequence[_Asked]) -> list[RewardAnswer]:
        """Score; a reward server that is asked for it has as long as the clients wait, and no longer."""
        nonlocal late
        with time_limit(timeout):
            try:
                return _reward(reward, asked)
            finally:
                late = time_left() <= 0.0

    batcher = Batcher[_Asked, RewardAnswer](work, capacity=capacity, max_batch=batch_size)
    app = make_app("infalign serve-reward", max_body=MAX_BODY)

    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}

    @app.post("/get_reward", responses=errors)
    async def get_reward(asked: RewardRequest, request: Request) -> RewardAnswer:
        """Reward responses to the run's training prompts."""
        pairs = list(zip(asked.query, asked.prompts, strict=True))
        wanted = _Asked(
            [texts.prompt_id(prompt) for _, prompt in pairs], [texts.response(query, prompt) for query, prompt in pairs]
        )
        return await while_connected(request, batcher.do(wanted, timeout=timeout))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """How busy the server is."""
        status = "late" if late or batcher.longest_under_way > timeout else "ok"
        return {
            "status": status,
            "open": batcher.num_open,
            "waiting": batcher.num_waiting,
            "capacity": batcher.capacity,
        }

    return app, batcher


def _reward(reward: TrainerReward, asked: Sequence[_Asked]) -> list[RewardAnswer]:
    """Score several requests in one go."""
    worth = reward([i for one in asked for i in one.prompt_ids], [text for one in asked for text in one.responses])
    answers: list[RewardAnswer] = []
    start = 0
    for one in asked:
        rows = slice(start, start + len(one.responses))
        calibrated = worth.calibrated_B[rows].tolist()
        answers.append(
            RewardAnswer(
                rewards=worth.nats_B[rows].tolist(),
                scores=calibrated,
                extra_logs={"calibrated_reward": calibrated, "raw_reward": worth.rewards_B[rows].tolist()},
            )
        )
        start = rows.stop
    return answers
