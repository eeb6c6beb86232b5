"""Damage to files is told from what is no damage."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infalign._io.inventory import (
    damaged_files,
    read_object,
    read_sealed,
    same_content,
    sealed,
    take_inventory,
    unreadable_files,
    what_falls_with,
)
from infalign.errors import StorageError


def table(*rows):
    return pa.table(
        {"prompt_id": [p for p, _, _ in rows], "index": [i for _, i, _ in rows], "text": [t for *_, t in rows]}
    )


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "run"
    (root / "store" / "rollouts").mkdir(parents=True)
    pq.write_table(table(("a", 0, "x"), ("a", 1, "y")), root / "store" / "rollouts" / "000000.parquet")
    (root / "store" / "manifest.json").write_text("{}")
    (root / "store" / "README.md").write_text("a card")
    (root / "plan.json").write_text('{"kl": 1}')
    return root


def test_a_copy_and_what_is_added_are_no_damage(root, tmp_path):
    known = take_inventory(root, ["store", "plan.json", "nothing"])
    assert sorted(known["files"]) == ["plan.json", "store/manifest.json", "store/rollouts/000000.parquet"]
    assert damaged_files(root, known) == []
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "store" / "README.md").write_text("another card")
    (tmp_path / "copy" / "store" / "kl.json").write_text("{}")
    assert damaged_files(tmp_path / "copy", known) == []
    (root / "plan.json").rename(root / "kept.json")
    (root / "plan.json").symlink_to(root / "kept.json")
    assert damaged_files(root, known) == [], "a link to the same content"


@pytest.mark.parametrize("how", ["cut", "same size", "gone", "link", "folder", "pipe"])
def test_damage(root, how):
    known, path = take_inventory(root, ["plan.json"]), root / "plan.json"
    if how == "cut":
        path.write_text("{")
    elif how == "same size":
        path.write_text('{"kl": 2}')
    else:
        path.unlink()
    if how == "link":
        path.symlink_to(root / "nowhere")
    elif how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    assert damaged_files(root, known) == ["plan.json"]


def test_rows_are_the_same_in_other_files_and_another_order(root):
    then = take_inventory(root, ["store"])
    folder = root / "store" / "rollouts"
    (folder / "000000.parquet").unlink()
    pq.write_table(table(("a", 1, "y")), folder / "000001.parquet")
    pq.write_table(table(("a", 0, "x")), folder / "000002.parquet")
    assert same_content(then, take_inventory(root, ["store"]))
    pq.write_table(table(("a", 0, "z")), folder / "000002.parquet")
    assert not same_content(then, take_inventory(root, ["store"]))
    assert same_content({}, then), "of an earlier version nothing is known"


def test_what_cannot_be_read_of_unfinished_work(root):
    assert unreadable_files(root, ["store", "plan.json", "nothing"]) == []
    (root / "plan.json").write_text("[]")
    (root / "store" / "manifest.json").write_text('{"')
    os.truncate(root / "store" / "rollouts" / "000000.parquet", 100)
    assert unreadable_files(root, ["store", "plan.json"]) == [
        *("store/manifest.json", "store/rollouts/000000.parquet", "plan.json"),
    ]
    assert what_falls_with("rollouts/reference/manifest.json") == "rollouts/reference"
    assert what_falls_with("rollouts/reference/rewards/one/source.json") == "rollouts/reference/rewards/one"
    assert what_falls_with("plan.json") == "plan.json"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_json_file_that_is_damaged_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"x\.json: .*damaged.*\. Do this"):
        read_object(tmp_path / "x.json", "Do this")


def test_a_sealed_file_is_whole_or_nothing(tmp_path):
    path, content = tmp_path / "kl.json", {"ids": ["a", "\ud83d"], "kl": [0.125, 1e-9]}
    path.write_text(json.dumps(sealed(content)))
    assert read_sealed(path) == content
    path.write_text(path.read_text().replace("0.125", "0.225"))
    assert read_sealed(path) is None
    path.write_text(json.dumps(content))
    assert read_sealed(path) == content, "of an earlier version"
    path.write_text("[1]")
    assert read_sealed(path) is None
    assert read_sealed(tmp_path / "nothing") is None
