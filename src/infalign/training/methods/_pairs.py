"""What comparators share that learn from pairs: the best and the worst of every n stored rollouts of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from infalign.errors import InputError
from infalign.training.losses import Examples
from infalign.training.methods.base import Comparator

if TYPE_CHECKING:
    import torch

    from infalign.training.pool import RolloutPool


class PairComparator(Comparator):
    """A loss on best-and-worst pairs, with the setting `n`: the size of the groups that they are taken from."""

    online = False
    rollouts_per_example = 2

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.num_ref = self.settings["n"]

    def require_references(self, num_ref: int) -> None:
        """Refuse a recipe whose groups are larger than the number of references per prompt."""
        if num_ref < self.num_ref:
            raise InputError(
                f"{self.label} takes the best and the worst of {self.num_ref}, but there are only {num_ref} reference "
                "rollouts per prompt",
                where="compare_with",
                hint="Use a smaller n, or more rollouts.num_ref",
            )


def best_and_worst(pool: RolloutPool, n: int, target: float = 0.0) -> Examples:
    """The best and the worst of every n of a prompt's rollouts, in the order they were drawn; ties give no pair.

    Args:
        pool: The rollouts.
        n: Size of the groups.
        target: What the loss of a pair compares with.

    Raises:
        InputError: If no prompt has n rollouts of different rewards, or n is less than 2.
    """
    if n < 2:
        raise InputError(f"the best and the worst of {n}", where="n", hint="Use at least 2")
    pairs: list[tuple[int, int]] = []
    for prompt in range(len(pool.prompts)):
        rows = np.flatnonzero(pool.prompt_R == prompt)
        for start in range(0, len(rows) - n + 1, n):
            group = rows[start : start + n]
            ranks = pool.ranks_R[group]
            if ranks.max() > ranks.min():
                pairs.append((int(group[ranks.argmax()]), int(group[ranks.argmin()])))
    if not pairs:
        raise InputError(f"no prompt has {n} rollouts of different rewards", where="best and worst",
                         hint="Draw more reference rollouts per prompt (rollouts.num_ref), or lower n")  # fmt: skip
    return Examples(np.array(pairs, dtype=np.int64), np.full(len(pairs), target), np.ones(len(pairs)))


def lead(log_ratios_NM: torch.Tensor) -> torch.Tensor:
    """Log-ratio of the best less that of the worst of each pair, shape (N,)."""
    return log_ratios_NM[:, 0] - log_ratios_NM[:, 1]
