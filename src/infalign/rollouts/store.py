"""The rollout store: responses of one policy with their log-probabilities, and the rewards that each source gave them.

    manifest.json                what produced the rollouts (`RolloutKey`)
    rollouts/000000.parquet …    one row per rollout
    rewards/<source>/source.json what produced these rewards
    rewards/<source>/000000.parquet …
    computed/000000.parquet …    tokens and log-probabilities that the sampler did not give, computed afterwards

Rollout `index` of a prompt is 0..K−1. Any Parquet reader can read it; `dataset()` gives a Hugging Face `Dataset`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infalign._io.files import write_json
from infalign._io.inventory import read_object
from infalign._io.wording import counted
from infalign.errors import InputError, MismatchError, StorageError
from infalign.rollouts.key import RolloutKey, model_fingerprint
from infalign.rollouts.shards import ShardLog

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["REWARD_SCHEMA", "ROLLOUT_SCHEMA", "RolloutKey", "RolloutStore", "model_fingerprint"]

ROLLOUT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),  # with the end token where the response ended by itself; null if unknown
        ("logprob", pa.float64()),  # sum over the response's tokens, in nats, under the sampler; null if unknown
        ("num_tokens", pa.int32()),  # with the end token
        ("finish_reason", pa.string()),  # "stop": ended by itself; "length": cut at max_new_tokens
    ]
)
REWARD_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("reward", pa.float64()),  # null: the source could not score this rollout
        ("error", pa.string()),  # why not
    ]
)
COMPUTED_SCHEMA = pa.schema(
    [ROLLOUT_SCHEMA.field(n) for n in ("prompt_id", "index", "token_ids", "logprob", "num_tokens")]
)
_arrow: Any = vars(pc)  # pyarrow makes these functions at run time, unseen by type checkers
_FORMAT = 1
_AGAIN = "Run its recipe again, or remove this store: what it held is drawn again"
_MANIFEST = "manifest.json"


class RolloutStore:
    """Rollouts of one policy on disk. Make one with `RolloutStore.open`.

    Appending takes a lock: a second writer is refused, readers are never in the way.
    """

    def __init__(self, path: Path, key: RolloutKey) -> None:
        self.path = path
        self.key = key
        self._log = ShardLog(path / "rollouts", ROLLOUT_SCHEMA)
        self._computed = ShardLog(path / "computed", COMPUTED_SCHEMA)
        self._rewards: dict[str, ShardLog] = {}
        self._present: dict[str, set[int]] | None = None  # known only while this object holds the lock

    @classmethod
    def open(cls, path: str | Path, key: RolloutKey | None = None) -> RolloutStore:
        """Open a store, or begin one.

        Args:
            path: Folder of the store.
            key: What is going to produce its rollouts. Without a key an existing store is opened as it is.

        Raises:
            MismatchError: The store was made with another key; says what differs.
            StorageError: There is no store (and no key to begin one), or it cannot be read or written.
        """
        folder = Path(path)
        manifest = folder / _MANIFEST
        if not manifest.exists():
            if key is None:
                raise StorageError("there is no rollout store here", where=str(folder), hint="Draw rollouts first")
            if (folder / "rollouts").exists() and any((folder / "rollouts").glob("*.parquet")):
                raise StorageError("there are rollouts but no manifest that says what made them", where=str(folder),
                                   hint="Use another folder")  # fmt: skip
            _make_folder(folder)
            write_json(manifest, {"format": _FORMAT, "key": key.to_dict()})
            return cls(folder, key)
        stored = _read_json(manifest)
        if stored.get("format") != _FORMAT:
            raise StorageError(f"the store has format {stored.get('format')!r}, this version reads {_FORMAT}",
                               where=str(manifest))  # fmt: skip
        try:
            stored_key = RolloutKey(**stored["key"])
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError("the manifest is damaged", where=str(manifest), hint=_AGAIN) from error
        if key is not None:
            key.require_same(stored_key, str(folder))
        return cls(folder, stored_key)

    @classmethod
    def read(cls, path: str | Path) -> RolloutStore:
        """Open an existing store as it is; errors as in `open`."""
        return cls.open(path)

    # --- rollouts ----------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to append rollouts, from looking up what is missing until it is written.

        Raises:
            StorageError: Somebody else is writing.
        """
        with self._log.writing():
            outermost = self._present is None
            if outermost:
                self._present = self.present()
            try:
                yield
            finally:
                if outermost:
                    self._present = None

    def append(self, rows: Mapping[str, Sequence[Any]] | pa.Table) -> None:
        """Add rollouts in one atomic step. Columns: see the schema; `token_ids` and `logprob` may hold None.

        Raises:
            InputError: One of them is already in the store, or twice among the new ones.
            StorageError: They cannot be written; nothing was added then.
        """
        table: pa.Table = rows if isinstance(rows, pa.Table) else pa.table(dict(rows), schema=ROLLOUT_SCHEMA)
        with self.writing():
            present = self.present()
            new: dict[str, set[int]] = {}
            for prompt, index in zip(table["prompt_id"].to_pylist(), table["index"].to_pylist(), strict=True):
                if index in present.get(prompt, ()) or index in new.setdefault(prompt, set()):
                    raise InputError(f"rollout {index} of prompt {prompt} is already there", where=str(self.path))
                new[prompt].add(index)
            self._log.append(table)
            for prompt, indices in new.items():
                present.setdefault(prompt, set()).update(indices)

    def present(self) -> dict[str, set[int]]:
        """Which rollouts are there: for each prompt id its indices."""
        if self._present is not None:
            return self._present
        table = self._log.read(["prompt_id", "index"])
        found: dict[str, set[int]] = {}
        for prompt, index in zip(table["prompt_id"].to_pylist(), table["index"].to_pylist(), strict=True):
            found.setdefault(prompt, set()).add(index)
        return found

    def __len__(self) -> int:
        return self._log.read(["index"]).num_rows

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rollouts as an Arrow table, in the order they were drawn."""
        wanted = ROLLOUT_SCHEMA.names if columns is None else list(columns)
        later = [name for name in wanted if name in COMPUTED_SCHEMA.names[2:]]
        computed = self._computed.read() if later and self._computed.folder.is_dir() else None
        if computed is None or not computed.num_rows:
            return self._log.read(columns)
        table = self._log.read(list(dict.fromkeys(["prompt_id", "index", *wanted])))
        order = np.argsort(_pair_keys(computed), kind="stable")
        keys, mine = _pair_keys(computed)[order], _pair_keys(table)
        place = np.minimum(np.searchsorted(keys, mine), len(keys) - 1)
        found = keys[place] == mine
        rows = pa.array(order[place], mask=~found)
        for name in later:
            filled = _arrow["coalesce"](table[name], computed[name].take(rows))
            table = table.set_column(table.schema.get_field_index(name), name, filled)
        return table.select(wanted)

    def append_computed(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Add tokens and log-probabilities of rollouts that have none, in one atomic step; columns `COMPUTED_SCHEMA`.

        Raises:
            StorageError: They cannot be written; nothing was added then.
        """
        with self._computed.writing():
            self._computed.append(pa.table(dict(rows), schema=COMPUTED_SCHEMA))

    def forget_missing(self) -> None:
        """Drop the rewards and computed columns of rollouts that are gone: what is drawn instead may be another text.

        Raises:
            StorageError: A file cannot be read or written.
        """
        there = pa.array(_pair_keys(self._log.read(["prompt_id", "index"])), pa.string())
        rewards = [ShardLog(path, REWARD_SCHEMA) for path in sorted(self.path.glob("rewards/*/"))]
        for log in (self._computed, *rewards):
            if log.shards:
                log.keep_only(lambda table: _arrow["is_in"](pa.array(_pair_keys(table), pa.string()), value_set=there))

    def dataset(self) -> Dataset:
        """All rollouts as a Hugging Face `Dataset`, with a column `reward_<source>` for each reward source."""
        from datasets import Dataset

        table = self.table()
        for source in self.reward_sources:
            values = self._align_rewards(source, table)
            table = table.append_column(f"reward_{source}", pa.array(values, from_pandas=True))
        return Dataset(table)

    def column_PK(self, column: str, prompt_ids: Sequence[str], k: int) -> NDArray[Any]:  # noqa: N802
        """One column of the first k rollouts of each prompt, shape (P, k), in the order of `prompt_ids` and index.

        Numbers come as float64 or int64, everything else as objects.

        Raises:
            InputError: A rollout is not in the store, or has no value in this column.
        """
        if column not in ROLLOUT_SCHEMA.names:
            raise InputError(f"there is no column {column!r}", where="column_PK",
                             hint=f"There are: {', '.join(ROLLOUT_SCHEMA.names)}")  # fmt: skip
        columns = list(dict.fromkeys(["prompt_id", "index", column]))
        table, rows_PK = self._locate(self.table(columns), prompt_ids, k, "rollouts")
        values = table[column]
        if values.null_count:
            empty = np.flatnonzero(values.is_null().to_numpy()[rows_PK.ravel()])
            if empty.size:
                at = f"rollout {empty[0] % k} of prompt {prompt_ids[empty[0] // k]}"
                hint = "infalign.rollouts.fill.compute_logprobs computes what a server did not give"
                raise InputError(f"{counted(empty.size, 'rollout has', 'rollouts have')} no {column}, the first "
                                 f"is {at}", where=str(self.path),
                                 hint=hint)  # fmt: skip
        if pa.types.is_integer(values.type):
            return values.to_numpy().astype(np.int64)[rows_PK]
        if pa.types.is_floating(values.type):
            return values.to_numpy()[rows_PK]
        objects = np.empty(len(values), dtype=object)
        objects[:] = values.to_pylist()
        return objects[rows_PK]

    def lists_PK(self, column: str, prompt_ids: Sequence[str], k: int) -> list[list[Any]]:  # noqa: N802
        """As `column_PK`, but as lists of plain values: k per prompt. For `token_ids` and `text`."""
        return self.column_PK(column, prompt_ids, k).tolist()

    # --- rewards -----------------------------------------------------------------------------------------------------

    @property
    def reward_sources(self) -> list[str]:
        """Keys of the sources that scored rollouts of this store."""
        folder = self.path / "rewards"
        if not folder.is_dir():
            return []
        return sorted(_read_source(path)["key"] for path in folder.glob("*/source.json"))

    @contextmanager
    def writing_rewards(self, source_key: str, description: Mapping[str, Any] | None = None) -> Iterator[None]:
        """Hold the right to append rewards of one source.

        Raises:
            MismatchError: The same key stands for another source there.
            StorageError: Somebody else is writing rewards of this source.
        """
        log = self._reward_log(source_key)
        with log.writing():
            path = log.folder / "source.json"
            wanted = {"key": source_key, "description": dict(description or {})}
            if not path.exists():
                write_json(path, wanted)
            elif description is not None:
                there = _read_source(path)["description"]
                different = [f"{name} was {there.get(name)!r} and is now {wanted['description'].get(name)!r}"
                             for name in sorted({*there, *wanted["description"]})
                             if there.get(name) != wanted["description"].get(name)]  # fmt: skip
                if different:
                    raise MismatchError(
                        "these rewards were made with other settings: " + "; ".join(different),
                        where=str(log.folder),
                        hint="Give the changed source another key",
                    )
            yield

    def append_rewards(
        self,
        source_key: str,
        prompt_ids: Sequence[str],
        indices: Sequence[int] | NDArray[np.integer],
        rewards: Sequence[float | None] | NDArray[np.float64],
        errors: Sequence[str | None] | None = None,
    ) -> None:
        """Add rewards of one source in one atomic step. A later reward of the same rollout replaces an earlier one.

        Args:
            source_key: Which source.
            prompt_ids: Prompt of each rollout, shape (B,).
            indices: Index of each rollout within its prompt, shape (B,).
            rewards: Shape (B,); NaN or None marks a rollout that the source could not score.
            errors: Why not, shape (B,); None where it could.

        Raises:
            InputError: The lengths differ, or a reward is infinite.
            StorageError: They cannot be written; nothing was added then.
        """
        values = np.array([np.nan if reward is None else reward for reward in rewards], dtype=np.float64)
        reasons = [None] * values.size if errors is None else list(errors)
        if not len(prompt_ids) == len(indices) == values.size == len(reasons):
            lengths = (
                f"{len(prompt_ids)} prompt ids, {len(indices)} indices, {values.size} rewards, {len(reasons)} errors"
            )
            raise InputError(lengths, where="append_rewards", hint="Give one of each per rollout")
        if np.isinf(values).any():
            raise InputError(
                f"{counted(int(np.isinf(values).sum()), 'reward is', 'rewards are')} infinite", where="append_rewards"
            )
        table = pa.table(
            {
                "prompt_id": pa.array(list(prompt_ids), pa.string()),
                "index": pa.array(indices, pa.int32()),
                "reward": pa.array(values, pa.float64(), from_pandas=True),
                "error": pa.array(reasons, pa.string()),
            }
        )
        with self.writing_rewards(source_key):
            self._reward_log(source_key).append(table)

    def rewards(self, source_key: str) -> pa.Table:
        """Rewards of one source: prompt_id, index, reward (null where it could not score) and error; latest only."""
        table = self._reward_log(source_key).read()
        identity = _pair_keys(table)
        # The last row of each rollout counts: the first of the reversed table.
        _, last = np.unique(identity[::-1], return_index=True)
        return table.take(np.sort(len(identity) - 1 - last))

    def rewards_PK(  # noqa: N802
        self,
        source_key: str,
        prompt_ids: Sequence[str],
        k: int,
        *,
        allow_modified_sampling: bool = False,
        allow_unscored: bool = False,
    ) -> NDArray[np.float64]:
        """Rewards of the first k rollouts of each prompt, shape (P, k), in the order of `prompt_ids` and index.

        Args:
            source_key: Which source.
            prompt_ids: P prompts.
            k: Rollouts per prompt.
            allow_modified_sampling: Accept rollouts drawn at a temperature or top_p other than 1. Calibration on them
                would refer to another policy than the one trained against.
            allow_unscored: Give NaN for a rollout that the source could not score.

        Raises:
            InputError: A rollout is missing or unscored (says how many and the first), or sampling was modified.
        """
        if not (self.key.samples_the_policy or allow_modified_sampling):
            raise InputError(
                f"these rollouts were drawn at temperature {self.key.temperature} and top_p {self.key.top_p}",
                where=str(self.path),
                hint="Calibration needs draws of the policy itself; pass allow_modified_sampling to use them anyway",
            )
        table, rows_PK = self._locate(self.rewards(source_key), prompt_ids, k, f"rewards of {source_key}")
        values_PK = table["reward"].to_numpy()[rows_PK]
        unscored = np.argwhere(np.isnan(values_PK))
        if len(unscored) and not allow_unscored:
            p, index = unscored[0]
            reason = table["error"][int(rows_PK[p, index])].as_py() or "no reason given"
            at = f"rollout {index} of prompt {prompt_ids[p]} ({reason})"
            raise InputError(
                f"{len(unscored)} of {counted(values_PK.size, 'rollout')} could not be scored, the first is {at}",
                where=str(self.path),
                hint="Fix the reward and score again, or leave these prompts out",
            )
        return values_PK

    # --- inside ------------------------------------------------------------------------------------------------------

    def _reward_log(self, source_key: str) -> ShardLog:
        if source_key not in self._rewards:
            self._rewards[source_key] = ShardLog(self.path / "rewards" / _folder_name(source_key), REWARD_SCHEMA)
        return self._rewards[source_key]

    def _align_rewards(self, source_key: str, rollouts: pa.Table) -> NDArray[np.float64]:
        rewards = self.rewards(source_key)
        value_of = dict(zip(_pair_keys(rewards).tolist(), rewards["reward"].to_pylist(), strict=True))
        return np.array([value_of.get(pair) for pair in _pair_keys(rollouts).tolist()], dtype=np.float64)

    def _locate(
        self, table: pa.Table, prompt_ids: Sequence[str], k: int, what: str
    ) -> tuple[pa.Table, NDArray[np.int64]]:
        """Where in `table` the rollouts 0..k−1 of each prompt are, shape (P, k)."""
        if len(set(prompt_ids)) != len(prompt_ids):
            raise InputError("a prompt id comes twice", where="prompt_ids")
        table = table.combine_chunks()
        prompt_R = _arrow["index_in"](table["prompt_id"], value_set=pa.array(list(prompt_ids), pa.string()))
        prompt_R = prompt_R.fill_null(-1).to_numpy()
        index_R = table["index"].to_numpy()
        wanted = np.flatnonzero((prompt_R >= 0) & (index_R < k))
        rows_PK = np.full((len(prompt_ids), k), -1, dtype=np.int64)
        rows_PK[prompt_R[wanted], index_R[wanted]] = wanted
        missing = np.argwhere(rows_PK < 0)
        if len(missing):
            p, index = missing[0]
            raise InputError(
                f"{len(missing)} of {rows_PK.size} {what} are missing, the first is rollout {index} of prompt "
                f"{prompt_ids[p]}",
                where=str(self.path),
                hint="Draw and score them first",
            )
        return table, rows_PK


def _pair_keys(table: pa.Table) -> NDArray[Any]:
    """One sortable value per (prompt_id, index)."""
    index = table["index"].cast(pa.string())
    return _arrow["binary_join_element_wise"](table["prompt_id"], index, "/").to_numpy()


def _folder_name(source_key: str) -> str:
    """A safe folder name, different for different keys."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", source_key).strip("-.")[:60]
    return f"{readable}-{hashlib.sha256(source_key.encode()).hexdigest()[:8]}"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder cannot be made ({error})", where=str(folder)) from error


def _read_source(path: Path) -> dict[str, Any]:
    content = _read_json(path)
    if not isinstance(content.get("key"), str) or not isinstance(content.get("description"), dict):
        raise StorageError("the file is damaged", where=str(path), hint=_AGAIN)
    return content


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, _AGAIN)
