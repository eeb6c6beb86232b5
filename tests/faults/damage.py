"""Damage to the files of a run folder, one at a time, and what a restart makes of it."""

import os
import shutil

from tests.faults.jobs import outcome
from tests.faults.killing import run_in_child

HINTS = ("A folder is in its place: move it away", "Put what it points to in its place, or remove it")
ELSEWHERE = "somebody else's file\n"


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def garble(path):
    """Other bytes in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, min(len(content) // 2 + 16, len(content))):
        content[at] ^= 0x5A
    path.write_bytes(bytes(content))


def delete(path):
    path.unlink()


def link(path):
    """A link to nowhere."""
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_elsewhere(path):
    """A link to another file, which must stay as it is."""
    path.unlink()
    elsewhere(path).write_text(ELSEWHERE)
    path.symlink_to(elsewhere(path))


def odd_json(path):
    """JSON, but not what it should be."""
    path.write_text("[1, null]")


def folder(path):
    """A folder in its place."""
    path.unlink()
    path.mkdir()


def elsewhere(path):
    """A file beside the run folder."""
    return next(one for one in path.parents if (one / "stages").is_dir()).with_name("elsewhere.txt")


def remove(path):
    """A folder or a link that stands in a file's place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


KINDS = {one.__name__: one for one in (truncate, empty, garble, delete, link, link_elsewhere, odd_json, folder)}


def files_of(out):
    """The files of a run folder that hold something."""
    return sorted(
        path.relative_to(out)
        for path in out.rglob("*")
        if path.is_file() and path.stat().st_size and "superseded" not in path.parts and path.name != ".lock"
    )


def restarted(job, out, overrides, expected, *, name, kind, copy):
    """Damage one file of a copy of a run and start again.

    Args:
        job: Folder with the recipe.
        out: The run, finished or not.
        overrides: Changes to the recipe.
        expected: Outcome of an undisturbed run.
        name: The file.
        kind: One of `KINDS`.
        copy: Folder for the copy.

    Returns:
        "identical" (if need be after doing what the message said), or what is wrong; and what was said.
    """
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy, symlinks=True)
    KINDS[kind](copy / name)
    log = copy.parent / "damage.log"
    log.unlink(missing_ok=True)
    said = run_in_child(job, copy, overrides, log)
    told, after = log.read_text() + said, ""
    if str(name) in said and any(hint in said for hint in HINTS):
        remove(copy / name)
        said, after = run_in_child(job, copy, overrides, log), " after what the message said"
    if kind == "link_elsewhere" and (copy.parent / "elsewhere.txt").read_text() != ELSEWHERE:
        return "wrote through the link", told
    if said != "done":
        return said, told
    return ("identical" if outcome(copy) == expected else "not identical") + after, told


def read(pipeline):
    """What verbs do that only read a run."""
    from infalign.report.build import build_report
    from infalign.run.stages.run import open_run

    run = open_run(pipeline.out)
    run.calibrator()
    run.prompts("evaluation")
    run.evaluated()
    build_report(pipeline.out)
