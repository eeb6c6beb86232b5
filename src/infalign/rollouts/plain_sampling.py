"""How to tell a server to sample the policy itself.

The OpenAI protocol has temperature and top_p. Servers add more on their own where a request is silent: `transformers
serve` decodes greedily, with top-k 50, unless the model's settings say otherwise; vLLM and SGLang take top-k and
penalties from the model's folder; llama.cpp keeps the 40 most likely tokens. Rollouts drawn so would calibrate
against another policy than the one that is trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from infalign._io.http import Endpoint, RequestRefusedError

# The first that a server accepts is used. vLLM, SGLang and llama.cpp read the first, each skipping what it does not
# know; `transformers serve` refuses it and reads the second.
_WAYS: tuple[dict[str, Any], ...] = (
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0},
    {
        "generation_config": json.dumps(
            {"do_sample": True, "top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
        )
    },
)


class PlainSampling:
    """Posts requests with the fields that switch off what a server would add to its sampling.

    Args:
        endpoint: The server.
        fields: Further fields of every request, for a server that takes none of the known ones.
    """

    def __init__(self, endpoint: Endpoint, fields: Mapping[str, Any] | None = None) -> None:
        self.endpoint = endpoint
        self._accepted: Mapping[str, Any] | None = fields
        self._given = 1  # the most choices of one answer so far
        self._limit: int | None = None  # more are refused

    def post_choices(self, path: str, content: Mapping[str, Any], count: int, *, largest_each: int) -> Any:
        """Ask for so many choices, or for as many as the server gives in one answer where it refuses more.

        Args:
            path: As for `post`.
            content: As for `post`, without `n`.
            count: How many choices.
            largest_each: Bytes of the largest choice.

        Raises:
            RequestRefusedError: The server refuses the request even for one choice, or for as many as it has given.
            EndpointError: As for `post`.
        """
        first: RequestRefusedError | None = None
        count = min(count, self._limit or count)
        while True:
            try:
                answer = self.post(path, {**content, "n": count}, largest=(1 << 20) + count * largest_each)
            except RequestRefusedError as error:
                first = first or error
                # So many have been given before, so that this request is refused for another reason.
                if count <= self._given:
                    raise first from None
                count //= 2
                continue
            self._given = max(self._given, count)
            if first is not None:
                self._limit = count
            return answer

    def post(self, path: str, content: Mapping[str, Any], *, largest: int) -> Any:
        """As `Endpoint.post`; raises RequestRefusedError where the server takes none of the known fields."""
        # Once a server has accepted a way, what it refuses later is the request's own fault.
        ways = _WAYS if self._accepted is None else (self._accepted,)
        refusals: list[RequestRefusedError] = []
        for fields in ways:
            try:
                answer = self.endpoint.post(path, {**content, **fields}, largest=largest)
            except RequestRefusedError as error:
                refusals.append(error)
                continue
            self._accepted = fields
            return answer
        if len(refusals) == 1:
            raise refusals[0]
        raise RequestRefusedError(
            "; otherwise asked: ".join(error.what for error in refusals),
            where=self.endpoint.url,
            hint="If the request is in order and the server takes no field that switches off top-k and penalties, "
            "pass request_fields: what it needs, or {} if it samples the policy itself without being told",
        ) from refusals[-1]
