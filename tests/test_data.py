"""Reading rows and prompts, with the errors a user meets, and a split that does not leak."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt, group_key, is_held_out, load_prompts, prompt_id, prompt_text, read_rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the repository, where there is one


def write_lines(path, rows):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ROWS = [{"prompt": "a é 🙂", "answer": 1}, {"prompt": "b", "answer": 2}]


def test_every_format_gives_the_same_rows(tmp_path):
    import datasets

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train.jsonl", ROWS)
    sources = [
        write_lines(tmp_path / "rows.jsonl", ROWS),
        write_lines(tmp_path / "rows.jsonl.gz", ROWS),
        tmp_path / "rows.parquet",
        tmp_path / "saved",
        tmp_path / "folder",
    ]
    for source in sources:
        assert read_rows(source, columns=["prompt", "answer"]) == ROWS
        assert read_rows(str(source), columns=["answer"], limit=1) == [{"answer": 1}]


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\n\n{"prompt": "b"}')
    assert read_rows(path, columns=["prompt"]) == [{"prompt": "a"}, {"prompt": "b"}]


def test_errors_name_the_place_and_the_mend(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="no such file"):
        read_rows(path)
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: this line is not UTF-8"):
        read_rows(path)
    path.write_bytes(b'{"prompt": "a"}\n{"prompt"\n')
    with pytest.raises(InputError, match="line 2: this line is not JSON"):
        read_rows(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(InputError, match="line 1: this line is not a JSON object"):
        read_rows(path)
    path.write_bytes(b"\n")
    with pytest.raises(InputError, match="no rows"):
        read_rows(path)
    write_lines(path, [{"prompts": "a", "answer": 1}])
    with pytest.raises(InputError, match=r"no column 'prompt'\. Did you mean 'prompts'"):
        read_rows(path, columns=["prompt"])
    broken = tmp_path / "rows.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 1000)[:-20])
    with pytest.raises(InputError, match="damaged"):
        read_rows(broken)
    parquet = tmp_path / "rows.parquet"
    parquet.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="not a readable Parquet"):
        read_rows(parquet)
    (tmp_path / "rows.xls").write_bytes(b"x")
    with pytest.raises(InputError, match="kind of file"):
        read_rows(tmp_path / "rows.xls")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no data set can be loaded"):
        read_rows(tmp_path / "empty")


def test_a_data_set_with_several_splits_asks_for_one(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(InputError, match="train, test"):
        read_rows(tmp_path / "both")
    assert read_rows(tmp_path / "both", split="test") == ROWS


def test_load_prompts_drops_duplicates_and_counts_them(tmp_path):
    rows = [{"prompt": p, "answer": i} for i, p in enumerate(["x", "y", "x", "z", "y"])]
    prompts = load_prompts(write_lines(tmp_path / "p.jsonl", rows))
    assert [p.prompt for p in prompts] == ["x", "y", "z"]
    assert prompts.duplicates == 2
    assert prompts[1].row == {"prompt": "y", "answer": 1}
    assert prompts[:2].ids == [prompt_id("x"), prompt_id("y")]
    assert len(load_prompts(tmp_path / "p.jsonl", limit=2)) == 2


def test_chat_prompts(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    (prompt,) = load_prompts(write_lines(tmp_path / "p.jsonl", [{"messages": chat}]), "messages")
    assert prompt.prompt == chat
    assert prompt.text == "system: Be kind.\n\nuser: Hi"
    # A text that reads like the messages is another prompt.
    assert prompt.id != Prompt(prompt_text(chat)).id
    assert prompt.id == Prompt([dict(reversed(message.items())) for message in chat]).id


@pytest.mark.parametrize(
    "bad", ["", "  \n", [], [{"role": "user", "content": " "}], 3, None, [{"role": "user"}], ["text"]]
)
def test_unusable_prompts_name_their_row(tmp_path, bad):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "fine"}, {"prompt": bad}])
    with pytest.raises(InputError, match=r"p\.jsonl, row 2, column 'prompt'"):
        load_prompts(path)


@pytest.mark.parametrize("bad", ['"half \\ud800"', '[{"role": "user", "content": "half \\ud800"}]'])
def test_text_that_no_tokenizer_can_take_names_its_row(tmp_path, bad):
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": {bad}}}\n')
    with pytest.raises(InputError, match="row 1, column 'prompt': the prompt holds half of a surrogate pair"):
        load_prompts(tmp_path / "p.jsonl")


def test_ids_are_stable():
    # Stores on disk depend on this value: changing it orphans every stored rollout.
    assert prompt_id("hello") == "306f89347195cc05"


def test_split_keeps_related_dialogues_together():
    start = "\n\nHuman: Hello   there\n\nAssistant:"
    longer = "\n\nHuman: hello there\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant:"
    chat = [{"role": "user", "content": "Hello there"}]
    assert group_key(start) == group_key(longer) == group_key(chat) == "hello there"
    prompts = [f"question {i}" for i in range(4000)]
    held = [is_held_out(p, 0.1) for p in prompts]
    # 400 expected, standard deviation 19; deterministic.
    assert 310 < sum(held) < 490
    assert all(is_held_out(p, 0.3) for p, h in zip(prompts, held, strict=True) if h)
    assert not any(is_held_out(p, 0.0) for p in prompts)
    assert all(is_held_out(p, 1.0) for p in prompts)
    with pytest.raises(InputError, match="fraction"):
        is_held_out("x", 1.5)


def test_the_two_sides_are_disjoint_and_complete(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(200)])
    train, held = load_prompts(path, held_out=0.2), load_prompts(path, held_out=0.2, side="held_out")
    assert len(train) + len(held) == 200
    assert not set(train.ids) & set(held.ids)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data are not here")
def test_split_agrees_with_the_shared_one():
    spec = importlib.util.spec_from_file_location("split", SHARED / "split.py")
    shared_split = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared_split)
    prompts = load_prompts(SHARED / "hh-prompts" / "prompts.jsonl.gz", limit=500)
    for prompt in prompts:
        assert group_key(prompt.prompt) == shared_split.group_key(prompt.prompt)
        assert is_held_out(prompt.prompt, 0.1) == shared_split.is_held(prompt.prompt, 0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_split_is_said_with_the_splits_that_there_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "saved")
    rows.save_to_disk(tmp_path / "single")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "folder" / "test.jsonl").write_text('{"prompt": "b"}\n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    for name, split, told in [
        ("saved", "valid", "there is no split 'valid'. Did you mean 'validation'? There are: train, validation"),
        ("folder", "tset", "there is no split 'tset'. Did you mean 'test'? There are: "),
        ("single", "test", "there is no split 'test'. There are: train"),
        ("rows.jsonl", "valid", "a file has no split 'valid'"),
    ]:
        with pytest.raises(InputError) as caught:
            read_rows(tmp_path / name, split=split)
        assert told in str(caught.value), str(caught.value)
        assert "KeyError" not in str(caught.value)
    assert read_rows(tmp_path / "saved", split="validation") == [{"prompt": "a"}, {"prompt": "b"}]
    assert read_rows(tmp_path / "single", split="train")[0] == {"prompt": "a"}
    assert read_rows(tmp_path / "folder", split="test") == [{"prompt": "b"}]
    assert read_rows(tmp_path / "rows.jsonl", split="train") == [{"prompt": "a"}]
