from __future__ import annotations

import codecs
import gzip
import json
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from memgen.environments.sources import HubSplit, Source, read_file

ROWS = [{"q": "one, two", "a": "1"}, {"q": 'a "quoted"\nline', "a": "2"}, {"q": "drei ✓", "a": "3"}]


def write_csv(rows, delimiter=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    return (
        "\n".join(delimiter.join(map(cell, line)) for line in [rows[0], *(row.values() for row in rows)])
        + "\n"
    )


def write(path, rows=ROWS):
    match path.name.removesuffix(".gz").partition(".")[2]:
        case "jsonl" | "lines.json":
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        case "json":
            content = json.dumps(rows, indent=1).encode()
        case "csv":
            content = write_csv(rows).encode()
        case "tsv":
            content = write_csv(rows, "\t").encode()
        case "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            return path
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.lines.json", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"]
)
def test_every_format_gives_the_same_records(tmp_path, name):
    records = list(read_file(write(tmp_path / name)))
    assert [dict(record.fields) for record in records] == ROWS
    assert [record.number for record in records] == [1, 2, 3]
    assert all(str(tmp_path / name) in record.where for record in records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": 1}\n{"q": \n', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"q": 1}\n\n{"q": \n', r"a\.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b"\xef\xbb\xbf\n \n", "has no lines"),
        ("a.jsonl", b'{"q": 1}\n[2]\n', r"a\.jsonl, line 2: expected an object"),
        ("a.jsonl", b"", "has no lines"),
        ("a.json", b'[{"q": 1}, 2]', r"a\.json, record 2: expected an object"),
        ("a.json", b'[{"q": 1}', r"a\.json: not a JSON array"),
        ("a.csv", b'q,a\n1,2\n"x\ny",2,3\n', r"a\.csv, line 3: 3 columns, but the first line names 2"),
        ("a.csv", b'q,a\n1,2\n"x"y,2\n', r"a\.csv, line 3: broken CSV"),
        ("a.csv", b"q,a\n1,\xff\n", r"a\.csv, line 2: not UTF-8"),
        ("a.csv", b"q,a\n", "has no lines"),
        ("a.parquet", b"nonsense", r"a\.parquet: broken Parquet"),
        ("a.jsonl.gz", b"nonsense", r"a\.jsonl\.gz: broken gzip"),
        ("a.xlsx", b"", r"files that end in \.xlsx are not read"),
    ],
)
def test_a_broken_file_is_an_error_that_names_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_file(tmp_path / name))


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        file = write(tmp_path / name)
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
        assert [dict(record.fields) for record in read_file(file)] == ROWS


def test_blank_lines_are_no_records_and_count_as_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'\n{"q": 1}\r\n\r\n \t\n{"q": 2}\n\n\n')
    records = list(read_file(tmp_path / "a.jsonl"))
    assert [record.fields["q"] for record in records] == [1, 2]
    assert [record.where.rpartition("line ")[2] for record in records] == ["2", "5"]


def test_hidden_files_are_no_data(tmp_path):
    for name in ("._test.jsonl", ".test.jsonl", "test.jsonl", "train/._a.jsonl", "train/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / "a.jsonl").replace(tmp_path / name)
    source = Source("task", str(tmp_path))
    assert source.local_files("test") == [tmp_path / "test.jsonl"]
    assert source.local_files("train") == [tmp_path / "train" / "a.jsonl"]


def test_half_a_surrogate_pair_is_named_with_file_line_and_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"q": "a"}\n{"q": "b\\ud83d", "c": ["\\udc00"], "d": "\\ud83d\\ude00"}\n'
    )
    record = list(read_file(tmp_path / "a.jsonl"))[1]
    assert record.text("d") == "😀"
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: \"q\" has half of a surrogate pair \('\\ud83d'\)"
    ):
        record.text("q")
    with pytest.raises(ValueError, match=r'a\.jsonl, line 2: "c" has half'):
        record.value("c")


def test_texts_come_as_they_are_written(tmp_path):
    """Libraries that guess types read dates, NA, numbers and lone surrogates otherwise."""
    values = ["2020-01-01", "NA", "1,200", "2.50", "None", ""]
    for name in ("a.jsonl", "a.csv"):
        file = write(tmp_path / name, [{"q": value, "a": "x"} for value in values])
        assert [record.fields["q"] for record in read_file(file)] == values
    (tmp_path / "b.jsonl").write_text('{"q": "\\ud800"}\n{"a": 1}\n')
    assert [dict(record.fields) for record in read_file(tmp_path / "b.jsonl")] == [{"q": "\ud800"}, {"a": 1}]


def test_odd_line_separators_do_not_shift_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"q": "a\u2028b"}\n{"q": "c"}\r\n{"q": '.encode() + b'"\xff"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not a JSON object"):
        list(read_file(tmp_path / "a.jsonl"))


def test_a_missing_column_is_an_error_that_names_file_line_and_column(tmp_path):
    second = list(read_file(write(tmp_path / "a.csv")))[1]
    with pytest.raises(ValueError, match=r'a\.csv, line 3: "x" is missing \(the record has q, a\)'):
        second.text("x")


def numbers(source, part):
    return [record.fields["a"] for record in source.records(part)]


@pytest.mark.parametrize(
    ("names", "part", "found"),
    [
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["aqua_dev.json", "test.json"], "val", ["aqua_dev.json"]),
        (["validation-00000-of-00001.parquet"], "val", ["validation-00000-of-00001.parquet"]),
        (
            ["train-00001-of-00002.parquet", "train-00000-of-00002.parquet"],
            "train",
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ),
        (["data/test.csv"], "test", ["data/test.csv"]),
        (
            ["test/algebra/10.json", "test/algebra/9.json"],
            "test",
            ["test/algebra/9.json", "test/algebra/10.json"],
        ),
        (["latest.jsonl", "contest.csv"], "test", []),
    ],
)
def test_the_files_of_a_split_are_found_by_their_names(tmp_path, names, part, found):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [{"a": name}])
    source = Source(task="T", path=str(tmp_path), folders=("data",))
    assert source.has(part) is bool(found)
    if found:
        assert numbers(source, part) == found
        assert [r.number for r in source.records(part)] == list(range(1, len(found) + 1))
    else:
        with pytest.raises(FileNotFoundError, match="set test_file"):
            source.records(part)


def test_several_files_of_one_split_are_an_error_unless_one_is_named(tmp_path):
    for name in ("test_a.jsonl", "test_b.jsonl"):
        write(tmp_path / name, [{"a": name}])
    with pytest.raises(
        ValueError, match=r"several test files \(test_a\.jsonl, test_b\.jsonl\); set test_file"
    ):
        Source(task="T", path=str(tmp_path)).records("test")
    assert numbers(Source("T", str(tmp_path), files={"test": "test_b.jsonl"}), "test") == ["test_b.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere"):
        Source("T", str(tmp_path), files={"test": "nowhere.jsonl"}).records("test")


@pytest.mark.parametrize(
    ("lone_file", "name", "splits"),
    [
        ("by_name", "dev.jsonl", {"val", "test"}),
        ("by_name", "some.csv", {"val", "test"}),
        ("by_name", "x_train.json", {"train"}),
        ("to_split", "dev.jsonl", {"val", "test"}),
        ("to_split", "some.csv", {"train"}),
        ("to_split", "x_train.json", {"train"}),
        ("test", "x_train.json", {"test"}),
        ("refused", "test.jsonl", set()),
    ],
)
def test_what_a_single_file_holds(tmp_path, lone_file, name, splits):
    source = Source("T", str(write(tmp_path / name)), lone_file=lone_file)
    assert {split for split in ("train", "val", "test") if source.has(split)} == splits
    for split in {"train", "val", "test"} - splits:
        with pytest.raises(FileNotFoundError, match=rf"is a file, which is not read as {split} data"):
            source.records(split)


def test_the_only_file_of_a_folder_may_be_the_set_to_split(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "published.jsonl", [{"a": "1"}])
    (tmp_path / "LICENSE.txt").touch()
    source = Source("T", str(tmp_path), folders=("data",), lone_file="to_split")
    assert [source.has(split) for split in ("train", "val", "test")] == [True, False, False]
    assert numbers(source, "train") == ["1"]
    write(tmp_path / "data" / "other.jsonl", [{"a": "2"}])
    with pytest.raises(FileNotFoundError, match="set train_file"):
        source.records("train")


def test_another_name_and_a_preference_find_one_of_several_files_and_folders(tmp_path):
    source = Source(
        "T", str(tmp_path), names={"test": "dev|test"}, prefer={"test": "dev"}, splits=("train", "test")
    )
    for name in ("test/a.jsonl", "dev/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, [{"a": name}])
    assert numbers(source, "test") == ["dev/b.jsonl"]
    for name in ("my-dev.jsonl", "test.jsonl"):
        write(tmp_path / name, [{"a": name}])
    assert numbers(source, "test") == ["my-dev.jsonl"]
    assert not source.has("val")


def test_a_path_that_is_nothing_says_what_to_set():
    with pytest.raises(FileNotFoundError, match=r"T: there is no directory \.\./nowhere.*set data\.path"):
        Source("T", "../nowhere", hub={"test": [HubSplit("test")]}).records("test")


def test_the_hub_is_asked_for_split_configuration_and_revision(monkeypatch):
    calls = []

    def load_dataset(*arguments, **settings):
        calls.append((arguments, settings))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    hub = {
        "test": [HubSplit("train", "a"), HubSplit("train", "b"), HubSplit("all", name="other/name")],
        "val": [HubSplit("dev")],
    }
    source = Source("T", "owner/name", hub=hub, revision="abc")
    assert [r.number for r in source.records("test")] == list(range(1, 10))
    assert source.records("val")[0].where == "owner/name dev, row 1"
    assert not source.has("train")
    assert calls == [
        (("owner/name", "a"), {"split": "train", "revision": "abc"}),
        (("owner/name", "b"), {"split": "train", "revision": "abc"}),
        (("other/name",), {"split": "all"}),
        (("owner/name",), {"split": "dev", "revision": "abc"}),
    ]


def test_an_unreachable_hub_is_one_line_that_says_what_to_set(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\n  many more lines")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = Source("T", "owner/name", hub={"test": [HubSplit("test")]})
    with pytest.raises(FileNotFoundError, match=r"could not be read from the hub .*set data\.path") as caught:
        source.records("test")
    assert "\n" not in str(caught.value)
