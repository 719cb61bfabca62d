"""Data as people have it: formats of files, and names of columns."""

import builtins
import gzip
import json
import os
import threading
import tracemalloc

import datasets
import pytest
import torch
from models import tokenizer
from test_callback import TEXTS

from merge_callback import MergeRefused
from merge_callback.rows import read_batches

ROWS = [{"text": text} for text in TEXTS]
LINES = "\n".join(map(json.dumps, ROWS))


def jsonl(path):
    path.write_text(LINES)


FORMATS = {
    "a.jsonl": jsonl,
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.encode()),
    "crlf.jsonl": lambda path: path.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "line.json": lambda path: path.write_text(json.dumps(ROWS)),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "a.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "a.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path, index=False),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        test=datasets.Dataset.from_list(ROWS[:1]), train=datasets.Dataset.from_list(ROWS)
    ).save_to_disk(path),
}


def ids(path, words=None, tokens=None):
    return [batch["input_ids"][0].tolist() for batch in read_batches(path, words, tokens)]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_same_in_every_format(tmp_path, capfd, name):
    words = tokenizer()
    FORMATS[name](tmp_path / name)
    capfd.readouterr()
    expected = [words(text)["input_ids"] for text in TEXTS]
    assert ids(tmp_path / name, words) == expected
    drawn = ids(tmp_path / name, words, 40)
    assert capfd.readouterr().err == ""  # no bars where there is no terminal
    jsonl(tmp_path / "plain.jsonl")
    assert len(drawn) == 4 and drawn == ids(tmp_path / "plain.jsonl", words, 40)


def test_of_a_large_file_only_places_are_kept(tmp_path):
    row = json.dumps({"input_ids": [1, 2], "other": "x" * 2000}) + "\n"
    (tmp_path / "a.jsonl").write_text(row * 10_000)
    tracemalloc.start()
    try:
        assert len(ids(tmp_path / "a.jsonl", None, 20)) == 10
        assert tracemalloc.get_traced_memory()[1] < 2e6  # of 20 MB
    finally:
        tracemalloc.stop()


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(LINES,))
    writer.start()
    assert len(ids(tmp_path / "pipe", tokenizer())) == 16
    writer.join()


ASKED, GIVEN, ANSWER = "w1 w2", "w3", "w4 w5"
SAID = [
    {"from": "system", "value": "w9"},
    {"from": "human", "value": ASKED},
    {"from": "gpt", "value": ANSWER},
]
CHAT = [
    {"role": "system", "content": "w9"},
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWER},
]


def test_columns_mean_what_trl_and_sharegpt_and_alpaca_mean_by_them(tmp_path):
    words, path = tokenizer(), tmp_path / "a.jsonl"
    words.chat_template = (
        "{% for m in messages %}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}a {% endif %}"
    )
    words.add_tokens(["s", "u", "a"])
    rows = [
        {"messages": CHAT},
        {"conversations": SAID},
        {"conversations": CHAT, "text": None},
        {"instruction": ASKED, "input": GIVEN, "output": ANSWER},
        {"instruction": ASKED, "input": "", "output": ANSWER},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    chat, said, same, alpaca, bare = read_batches(path, words)
    told = words("s w9 u w1 w2 a w4 w5")["input_ids"]
    for batch in (chat, said, same):
        assert batch["input_ids"].tolist() == batch["labels"].tolist() == [told]
    told = words("u w1 w2 w3 a w4 w5")["input_ids"]
    assert alpaca["input_ids"].tolist() == [told]
    assert alpaca["labels"].tolist() == [[-100] * 5 + told[5:]]
    assert bare["input_ids"].tolist() == [words("u w1 w2 a w4 w5")["input_ids"]]
    words.chat_template = None
    (*_, alpaca, bare) = [{"input_ids": torch.tensor([r])} for r in ids_of(rows[3:], path, words)]
    assert alpaca["input_ids"].tolist() == [words("w1 w2 w3 w4 w5")["input_ids"]]


def ids_of(rows, path, words):
    path.write_text("\n".join(map(json.dumps, rows)))
    return ids(path, words)


def says(path, words=None):
    with pytest.raises(MergeRefused) as caught:
        ids(path, words)
    return caught.value.problems[0]


def test_columns_that_are_none_of_these_are_listed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "w1", "answer": "w2"}]))
    told = says(tmp_path / "a.json", tokenizer())
    assert told.endswith("instruction and output; this one has question, answer")
    assert f"{tmp_path / 'a.json'}, row 1: " in told


def test_what_is_no_data_is_said_with_what_may_be(tmp_path):
    for name, content in {
        "a.parquet": b"PAR1\x00\x80\xff\xfe",
        "a.jsonl.gz": b"no gzip",
        "a.json": b'[{"text": "w1"}, ',
    }.items():
        (tmp_path / name).write_bytes(content)
        told = says(tmp_path / name)
        assert "cannot be read: " in told and "give JSON Lines or a JSON array" in told
    assert "cannot be read: " in says(tmp_path / "none.jsonl")
    (tmp_path / "none").mkdir()
    assert "cannot be read: " in says(tmp_path / "none")


def test_a_path_that_is_mistyped_is_said_not_to_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def nowhere(path):
        asked.append(path)
        raise ConnectionError("the Hub is not reached")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    told = says("data/train")
    assert told.startswith(
        "data/train cannot be read: no such file or directory, and as the id of a dataset on the "
        "Hub: the Hub is not reached; give JSON Lines"
    )
    assert asked == ["data/train"]
    for no_id in ("data/a--b", "data/a..b", "data/-a", "data/a.", "../data", "data/" + "a" * 97):
        told = says(no_id)
        assert told.startswith(f"{no_id} cannot be read: [Errno 2] No such file or directory")
    assert asked == ["data/train"]


def test_a_split_that_is_not_for_training_is_not_taken_for_one(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(a=data, b=data).save_to_disk(tmp_path / "saved")
    assert says(tmp_path / "saved").endswith("has no split called train, but a, b")


def test_without_datasets_json_is_read_and_else_it_is_asked_for(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    FORMATS["a.parquet"](tmp_path / "a.parquet")
    jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr(builtins, "__import__", without)
    assert len(ids(tmp_path / "a.jsonl", tokenizer())) == 16
    assert says(tmp_path / "a.parquet").endswith("pip install datasets")
