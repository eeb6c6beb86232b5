"""The run folder keeps what is done and redoes what depends on a changed setting."""

import json
import os
from pathlib import Path

import pytest

from infalign._io.files import storage_failure, write_json
from infalign.errors import MismatchError, StorageError
from infalign.run.folder import RunFolder, file_fingerprint, fingerprint
from infalign.run.stages.run import open_run


def test_fingerprint_ignores_key_order_but_not_content():
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


def test_file_fingerprint_follows_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert file_fingerprint(one) == file_fingerprint(two)
    two.write_bytes(b"other")
    assert file_fingerprint(one) != file_fingerprint(two)


def test_a_finished_stage_is_kept_and_an_unfinished_one_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run", "demo")
    assert folder.begin("work", {"k": 1}, ["work.txt"])
    (folder.path / "work.txt").write_text("half")
    assert folder.begin("work", {"k": 1}, ["work.txt"]), "stopped in the middle: it must run again"
    assert (folder.path / "work.txt").read_text() == "half", "and finds what it had done"
    folder.finish("work", 1.0)
    assert not RunFolder(tmp_path / "run", "demo").begin("work", {"k": 1}, ["work.txt"])


def test_other_settings_put_the_old_outputs_aside(tmp_path):
    folder = RunFolder(tmp_path / "run", "demo")
    folder.begin("work", {"k": 1}, ["deep/work.txt"])
    write_json(folder.path / "deep" / "work.txt", "precious")
    folder.finish("work", 1.0)
    assert folder.begin("work", {"k": 2}, ["deep/work.txt"])
    assert not (folder.path / "deep" / "work.txt").exists()
    (kept,) = (folder.path / "superseded").rglob("work.txt")
    assert json.loads(kept.read_text()) == "precious"


def test_outputs_without_a_stamp_are_put_aside(tmp_path):
    folder = RunFolder(tmp_path / "run", "demo")
    write_json(folder.path / "deep" / "work.txt", "precious")
    assert folder.begin("work", {"k": 1}, ["deep/work.txt"])
    assert not (folder.path / "deep" / "work.txt").exists()
    (kept,) = (folder.path / "superseded").rglob("work.txt")
    assert json.loads(kept.read_text()) == "precious"


def test_two_supersedes_in_one_second_keep_both(tmp_path, monkeypatch):
    monkeypatch.setattr("infalign.run.folder.time.time", lambda: 1000.0)
    folder = RunFolder(tmp_path / "run", "demo")
    for number in (1, 2, 1, 2):
        folder.begin("work", {"k": number}, ["work.txt"])
        (folder.path / "work.txt").write_text(f"of {number}")
        folder.finish("work", 1.0, ["work.txt"])
    kept = {path.parent.name: path.read_text() for path in folder.path.glob("superseded/*/work.txt")}
    one, two = fingerprint({"k": 1})[:8], fingerprint({"k": 2})[:8]
    assert kept == {f"work-{one}-1000": "of 1", f"work-{two}-1000": "of 2", f"work-{one}-1000-2": "of 1"}


def test_what_is_put_aside_is_said(tmp_path):
    said = []
    folder = RunFolder(tmp_path / "run", "demo", said.append)
    folder.begin("work", {"k": 1}, ["work.txt"])
    (folder.path / "work.txt").write_text("half")
    folder.begin("work", {"k": 2}, ["work.txt"])
    (line,) = said
    assert "work: an unfinished attempt was made with other settings (k: 1 then, 2 now)" in line
    assert "it is kept in superseded/work-" in line


def test_a_damaged_output_is_made_again_and_what_depends_on_it_where_it_came_out_otherwise(tmp_path):
    said = []
    folder = RunFolder(tmp_path / "run", "demo", said.append)

    def work(text):
        if folder.begin("work", {"k": 1}, ["work.txt"]):
            (folder.path / "work.txt").write_text(text)
            folder.finish("work", 1.0, ["work.txt"])
        return folder.stamp("work").print

    first = work("result")
    assert work("never written") == first
    (folder.path / "work.txt").write_text("garble")
    assert work("result") == first, "it came out as before"
    assert said == ["  work: work.txt is damaged or missing; it is done again"]
    (folder.path / "work.txt").unlink()
    with pytest.raises(
        StorageError, match=r"work\.txt: this file of the stage 'work' is damaged or missing. Do the stage"
    ):
        folder.require("work", {"k": 1}, "infalign work RECIPE")
    assert work("another result") == f"{first}-1"


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"fingerprint": 3}', '{"done": true}', "\ud800"])
def test_a_damaged_stamp_counts_as_none(tmp_path, content):
    folder = RunFolder(tmp_path / "run", "demo")
    folder.begin("work", {"k": 1}, ["work.txt"])
    (folder.path / "work.txt").write_text("precious")
    folder.finish("work", 1.0, ["work.txt"])
    (folder.path / "stages" / "work.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert folder.stamp("work") is None
    assert folder.begin("work", {"k": 1}, ["work.txt"])
    assert [path.read_text() for path in folder.path.glob("superseded/work-unknown-*/work.txt")] == ["precious"]


@pytest.mark.parametrize("left", [[], ["stages/"], [".77.part"], ["stages/", ".lock", "run.json"]])
def test_a_folder_whose_run_was_killed_as_it_began_can_be_used(tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir() if name.endswith("/") else (run / name).write_text('{"na')
    folder = RunFolder(run, "demo")
    with folder.writing():
        assert json.loads((run / "run.json").read_text())["name"] == "demo"
        assert sorted(path.name for path in run.iterdir()) == [".lock", "run.json", "stages"], "leftovers are gone"


def test_a_lost_run_json_is_written_again(tmp_path):
    said = []
    folder = RunFolder(tmp_path / "run", "demo")
    folder.begin("work", {"k": 1}, [])
    folder.finish("work", 1.0)
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.write_text("[]")):
        damage(folder.path / "run.json")
        assert not RunFolder(tmp_path / "run", "demo", said.append).begin("work", {"k": 1}, [])
    assert said == ["run.json is damaged; it is written again, and the stages say what is done"] * 2


def test_require_says_what_differs(tmp_path):
    folder = RunFolder(tmp_path / "run", "demo")
    with pytest.raises(MismatchError, match=r"'work' has not been done. Do it first with `infalign work RECIPE`"):
        folder.require("work", {"k": 1}, "infalign work RECIPE")
    folder.begin("work", {"k": 1, "same": 0}, [])
    with pytest.raises(MismatchError, match="has not been done"):
        folder.require("work", {"k": 1, "same": 0}, "infalign work RECIPE")
    folder.finish("work", 1.0)
    folder.require("work", {"k": 1, "same": 0}, "infalign work RECIPE")
    with pytest.raises(MismatchError, match=r"k: 1 then, 2 now") as caught:
        folder.require("work", {"k": 2, "same": 0}, "infalign work RECIPE")
    assert "same" not in str(caught.value)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"k": 1}, {"k": 1, "served": None}, "served: no such setting then, null now"),
        ({"k": 1, "served": None}, {"k": 1}, "served: null then, no such setting now"),
        ({"k": 1}, {"k": 1.0}, "k: 1 then, 1.0 now"),
        ({"t": {f"same{i}": i for i in range(99)}}, {"t": {f"same{i}": i for i in range(98)}},
         "t.same98: 98 then, no such setting now"),
        ({"t": {}, "u": [1, {"a": 2}]}, {"t": {"a": 1}, "u": (1, {"a": 2})},
         "t: {} then, no such setting now; t.a: no such setting then, 1 now"),
    ],
    ids=["added", "removed", "another type", "in a long section", "a section that was empty"],
)  # fmt: skip
def test_whatever_differs_is_said(tmp_path, then, now, said):
    folder = RunFolder(tmp_path / "run", "demo")
    folder.begin("work", then, [])
    folder.finish("work", 1.0)
    with pytest.raises(MismatchError) as caught:
        folder.require("work", now, "infalign work RECIPE")
    assert f"({said})" in str(caught.value)


def test_a_folder_of_another_recipe_or_of_something_else_is_refused(tmp_path):
    RunFolder(tmp_path / "run", "demo")
    with pytest.raises(MismatchError, match="holds a run of 'demo', not of 'other'"):
        RunFolder(tmp_path / "run", "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(MismatchError, match="not empty and holds no run"):
        RunFolder(tmp_path / "mine", "demo")


def test_a_file_in_the_way_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, MismatchError), match="file"):
        RunFolder(tmp_path / "file" / "run", "demo")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_reported():
    with pytest.raises(StorageError, match="No space left"):
        write_json(Path("/dev/full"), 2)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    folder, outside = RunFolder(tmp_path / "run", "demo"), tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run" / ".lock").symlink_to(outside)
    with pytest.raises(StorageError, match=r"\.lock: this folder cannot be locked"), folder.writing():
        pass
    assert outside.read_text() == "mine"


def test_a_folder_that_leads_elsewhere_is_refused(tmp_path):
    RunFolder(tmp_path / "run", "demo")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "policies").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="policies: this is a link"):
        RunFolder(tmp_path / "run", "demo")


def test_one_process_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path / "run", "demo"), RunFolder(tmp_path / "run", "demo")
    with first.writing(), pytest.raises(StorageError, match="another process is working"), second.writing():
        pass
    with second.writing():
        pass


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
@pytest.mark.parametrize("how", ["text", "torch", "safetensors"])
def test_a_write_cut_short_is_told_from_a_fault(tmp_path, how):
    """A limit on the size of files fails as a full disk does, through the libraries' own writers."""
    import resource

    import torch
    from safetensors.torch import save_file

    numbers = {"w": torch.zeros(10_000)}
    write = {
        "text": lambda path: path.write_text("x" * 40_000),
        "torch": lambda path: torch.save(numbers, path),
        "safetensors": lambda path: save_file(numbers, path),
    }[how]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011  (each library has its own)
            write(tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage_failure(caught.value)
    assert storage_failure(RuntimeError("shapes do not fit")) is None


def test_a_folder_of_another_version_is_refused(tmp_path):
    RunFolder(tmp_path, "one")
    marker = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(marker | {"format": 1}))
    for opened in (lambda: RunFolder(tmp_path, "one"), lambda: open_run(tmp_path)):
        with pytest.raises(MismatchError, match="another version of infalign wrote this folder"):
            opened()


@pytest.mark.parametrize(
    "name", ["../victim.txt", "../victim/manifest.json", "/etc/hostname", "a/../../victim.txt", "."]
)
def test_an_inventory_cannot_name_what_lies_outside(tmp_path, name):
    (tmp_path / "victim").mkdir()
    for one in ("victim.txt", "victim/manifest.json", "victim/more"):
        (tmp_path / one).write_text("precious")
    folder = RunFolder(tmp_path / "run", "one")
    with folder.writing():
        folder.begin("work", {"a": 1}, ["out"])
        (tmp_path / "run/out").write_text("x")
        folder.finish("work", 1.0, ["out"])
    stamp = json.loads((tmp_path / "run/stages/work.json").read_text())
    for known in ([1, 1, "x"], 5):
        stamp["inventory"]["files"] = {name: known}
        (tmp_path / "run/stages/work.json").write_text(json.dumps(stamp))
        with folder.writing():
            folder.begin("work", {"a": 1}, ["out"])
    assert (tmp_path / "victim.txt").read_text() == (tmp_path / "victim/manifest.json").read_text() == "precious"
    assert (tmp_path / "victim/more").is_file()
