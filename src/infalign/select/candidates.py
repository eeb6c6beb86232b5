"""Draw candidates: the small interface between a procedure and whatever generates text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from infalign.errors import InfalignError
from infalign.rollouts.prompts import Prompt


@dataclass(frozen=True)
class Request:
    """Candidates that are wanted for one prompt.

    Attributes:
        prompt: The prompt.
        stream: Names an endless row of independent draws for this prompt: candidate `index` is decided by
            (seed, stream, index). Another stream gives fresh draws.
        indices: Which candidates of the row.
    """

    prompt: Prompt
    stream: str
    indices: range


@dataclass(frozen=True)
class Draw:
    """One response.

    Attributes:
        text: The response, without its end token.
        num_tokens: Tokens generated, with the end token; None where the sampler cannot tell.
        finish_reason: "stop" if it ended by itself, "length" if it was cut.
    """

    text: str
    num_tokens: int | None
    finish_reason: str


@dataclass(frozen=True)
class Drawn:
    """What came of a request.

    Attributes:
        draws: As many as were asked for.
        num_tokens: Tokens generated for all of them; may be known where those of each are not.
    """

    draws: tuple[Draw, ...]
    num_tokens: int | None


class CandidateSampler(ABC):
    """Draws candidates from one policy. May be called from several threads at once."""

    name: str
    """What is sampled, for messages and records."""

    @abstractmethod
    def draw(self, requests: Sequence[Request], seed: int) -> list[Drawn | InfalignError]:
        """Answer every request, or say why it cannot be answered; one that fails does not harm the others.

        Args:
            requests: What is wanted.
            seed: With the same seed the same request has the same answer, as far as the sampler can promise that.
        """
