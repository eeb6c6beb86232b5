"""Exact counts: of every N candidates a fixed number comes from each policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infalign.errors import InputError
from infalign.procedures import whole_number
from infalign.rollouts.decode import uniforms
from infalign.rollouts.key import combined_fingerprint
from infalign.rollouts.mixture import MixturePolicy


class SplitPolicy(MixturePolicy):
    """Candidates of a base and an aligned policy (or several) in exact numbers, rather than at random.

    Any N draws of one stream with consecutive indices hold `counts` candidates of each policy, N their sum. The turn
    begins at a random place for each stream, so a single candidate is a draw of the mixture with weights n_m/N. The N
    are not independent: what is done with them is a procedure of its own (`infalign.reshape.ExactCounts`), and the win
    rate of `evaluate`, which takes its samples for independent, does not apply to it.

    Args:
        base: The base p: a policy, or a model that `open_policy` opens.
        aligned: The aligned policy, or several.
        counts: How many candidates each gives, the base's first.
        name: What to call it.

    Raises:
        InputError: The counts are not whole numbers from 0 with a positive sum, or not one for each policy; or as
            `MixturePolicy`.
    """

    def __init__(self, base: Any, aligned: Any, counts: Sequence[int], *, name: str | None = None) -> None:
        self.counts = tuple(whole_number(count, "counts", "SplitPolicy") if count != 0 else 0 for count in counts)
        if sum(self.counts) < 1:
            raise InputError("no candidate at all", where="SplitPolicy", hint="Give counts such as (12, 4)")
        n = sum(self.counts)
        super().__init__(base, aligned, [count / n for count in self.counts[1:]], name=name)
        if name is None:
            self.name = " + ".join(
                f"{count} of {one.name}" for count, (_, one) in zip(self.counts, self.parts, strict=True)
            )
        self._upto_count = np.cumsum(self.counts)

    @property
    def fingerprint(self) -> str:
        """Of its parts and their counts."""
        return combined_fingerprint("split", [one.fingerprint for _, one in self.parts], {"counts": self.counts})

    def part_of(self, seed: int, stream: str, index: int) -> int:
        """Which part draws candidate (seed, stream, index)."""
        n = sum(self.counts)
        start = int(uniforms(seed, f"{stream}\0split", 0, 1)[0] * n)
        return int(np.searchsorted(self._upto_count, (start + index) % n, side="right"))
