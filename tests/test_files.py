"""Files appear whole or not at all, under names that nobody can have prepared, and no link is followed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from infalign._io.files import (
    disk_failure,
    new_folder,
    plain_name,
    refuse_links_out,
    remove_unfinished,
    write_file,
    write_json,
    write_text,
)
from infalign.errors import InputError, StorageError


def test_content_and_rights(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_json(path, {"name": "é"})
    assert path.read_text() == '{\n "name": "é"\n}\n'
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(path.parent) == ["b.json"]


def test_half_a_surrogate_pair_stays_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", "\ud83d")
    assert (tmp_path / "x.json").read_text() == '"\\ud83d"\n'


@pytest.mark.parametrize("name", ["x.json", "x.json.tmp", "x.json.partial", "x.json.part", ".x.json.part"])
def test_a_link_in_the_way_is_never_followed(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    write_text(folder / "x.json", "new")
    assert outside.read_text() == "mine"
    assert (folder / "x.json").read_text() == "new"
    assert not (folder / "x.json").is_symlink()


def test_what_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"x: cannot be written \(No space left on device\)"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_larger_than_the_process_may_write(tmp_path: Path) -> None:
    """A real failure of the system in the middle of a file, in a process of its own."""
    code = (
        "import resource, sys; from pathlib import Path; from infalign._io.files import write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from infalign.errors import StorageError\n"
        "try: write_text(Path(sys.argv[1]), 'x' * 5000)\n"
        "except StorageError as error: print(error)\n"
    )
    path = tmp_path / "x"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written (File too large)" in done.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_stream_of_the_shell_is_written_to() -> None:
    code = (
        "from pathlib import Path; from infalign._io.files import write_text; write_text(Path('/dev/stdout'), 'hello')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "hello"


def test_a_folder_takes_its_place_whole(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    place = tmp_path / "model"
    place.symlink_to(outside)
    with new_folder(place) as folder:
        (folder / "weights").write_text("w")
    assert (place / "weights").read_text() == "w"
    assert not place.is_symlink()
    assert os.listdir(outside) == []

    def cut_short() -> None:
        with new_folder(place) as folder:
            (folder / "weights").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cut_short()
    assert (place / "weights").read_text() == "w"
    assert sorted(os.listdir(tmp_path)) == ["model", "outside"]


def test_a_link_to_a_folder_elsewhere_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "stages").mkdir(parents=True)
    (run / "inside").symlink_to(run / "stages")
    (run / "report.html").symlink_to(tmp_path / "victim")
    refuse_links_out(run)
    (run / "stages" / "policies").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="stages/policies: this is a link"):
        refuse_links_out(run)


def test_leftovers_of_killed_writers_go(tmp_path: Path) -> None:
    (tmp_path / "a" / ".0123.part").mkdir(parents=True)
    (tmp_path / ".4567.part").write_text("half")
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["a"]
    remove_unfinished(tmp_path, below=True)
    assert os.listdir(tmp_path / "a") == []


@pytest.mark.parametrize("name", ["optimal", "exponential-10", "my file (2)", "a.b_c", "t=3"])
def test_plain_names(name: str) -> None:
    assert plain_name(name, "plan.json") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/x", "a\\b", ".hidden", "a\n", "a\x00", "\u202ea", "x" * 201, 3, None, "a."]
)
def test_names_that_are_paths_are_refused(name: object) -> None:
    with pytest.raises(InputError, match="cannot be the name of a file"):
        plain_name(name, "plan.json")


def test_a_full_disk_while_a_tokenizer_or_a_model_is_saved(tmp_path: Path) -> None:
    """Libraries in Rust have exceptions of their own; a process that may write no more than 1,000 bytes to a file."""
    code = """
import resource, sys
from pathlib import Path
from infalign._io.files import disk_failure, storage_failure
from infalign.run.testbed.toy import random_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = random_llama(Path(sys.argv[1]) / "model", spread=1.0, max_length=32, seed=0)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for one in (tokenizer, model):
    try:
        one.save_pretrained(Path(sys.argv[1]) / "again")
    except Exception as error:
        print(type(error).__name__, storage_failure(error), disk_failure(error), sep=" | ")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert all("File too large" in line.split(" | ")[1] for line in lines), lines
    assert all("File too large" in line.split(" | ")[2] for line in lines), lines


def test_what_is_no_disk_failure() -> None:
    assert disk_failure(FileNotFoundError(2, "No such file")) is None
    assert disk_failure(ValueError("(os error 28)")) is None
    assert disk_failure(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
