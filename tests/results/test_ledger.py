"""Files that grow by whole items, whatever happens to the process that writes them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from memgen.results.ledger import Entry, Ledger, differences, read_journal, read_lines

SETTINGS = {"data": {"name": "maths", "hash": "ab"}, "keep": {"best": True}}
JOURNAL = "out.jsonl.journal"


def opened(folder, **changes) -> Ledger:
    return Ledger(folder / JOURNAL, ["out.jsonl", "more.jsonl"], {**SETTINGS, **changes})


def entry(index: int) -> Entry:
    lines = [{"index": index, "line": line, "text": "é\n" * index} for line in range(index % 3)]
    return Entry(index, {"out.jsonl": lines, "more.jsonl": [{"only": index}]}, {"kept": len(lines)})


def filled(folder, items=6, step=1) -> dict[str, bytes]:
    with opened(folder) as ledger:
        left = [index for index in range(items) if index not in ledger.notes]
        for begin in range(0, len(left), step):
            ledger.add([entry(index) for index in left[begin : begin + step]])
    return contents(folder)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_items_go_on_where_they_stopped_and_the_end_is_the_same(tmp_path):
    whole = filled(tmp_path / "whole")
    assert filled(tmp_path / "parts", items=2, step=2) != whole
    assert filled(tmp_path / "parts", items=5) != whole
    assert filled(tmp_path / "parts") == whole


def test_a_process_killed_at_any_byte_leaves_files_that_go_on_to_the_same_end(tmp_path):
    """The files are written in order, so a kill leaves each cut somewhere behind what the journal vouches for."""
    whole = filled(tmp_path / "whole", items=4)
    ends = [
        {JOURNAL: 0, "out.jsonl": 0, "more.jsonl": 0},
        *(
            {JOURNAL: position, **json.loads(line).get("ends", {"out.jsonl": 0, "more.jsonl": 0})}
            for position, line in _lines(whole[JOURNAL])
        ),
    ]
    tried = 0
    for before, after in pairwise(ends):
        states = [
            # The data of an item first, one file behind the other, and the journal's line of it at last.
            *({**before, "out.jsonl": n} for n in range(before["out.jsonl"], after["out.jsonl"] + 1, 5)),
            *(
                {**before, "out.jsonl": after["out.jsonl"], "more.jsonl": n}
                for n in range(before["more.jsonl"], after["more.jsonl"] + 1, 4)
            ),
            *({**after, JOURNAL: n} for n in range(before[JOURNAL], after[JOURNAL] + 1, 7)),
        ]
        for state in states:
            folder = tmp_path / f"killed{tried}"
            folder.mkdir()
            for name, size in state.items():
                if size or name == JOURNAL:
                    (folder / name).write_bytes(whole[name][:size])
            assert filled(folder, items=4) == whole, state
            tried += 1
    assert tried > 100


def _lines(content: bytes):
    position = 0
    for line in content.splitlines(keepends=True):
        position += len(line)
        yield position, line


def test_a_reader_sees_whole_items_only_while_they_are_written(tmp_path):
    filled(tmp_path, items=3)
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"index": 3, "li')
    assert [line["index"] for line in read_lines(tmp_path / JOURNAL, "out.jsonl")] == [1, 2, 2]
    assert set(read_journal(tmp_path / JOURNAL).notes) == {0, 1, 2}


def test_other_settings_are_refused_by_name(tmp_path):
    filled(tmp_path, items=2)
    with pytest.raises(
        ValueError, match=r"keep.best was true and is false; seed was not set and is 3\. Give"
    ):
        opened(tmp_path, keep={"best": False}, seed=3)
    assert filled(tmp_path, items=3)


def test_settings_are_compared_as_json_values(tmp_path):
    opened(tmp_path, delimiters=(",", ".")).close()
    opened(tmp_path, delimiters=[",", "."]).close()


def test_many_differences_are_counted_after_the_first_ones(tmp_path):
    before = {f"key{i}": i for i in range(9)}
    Ledger(tmp_path / JOURNAL, [], before).close()
    with pytest.raises(ValueError, match="key5 was 5 and is -5; and 3 more"):
        Ledger(tmp_path / JOURNAL, [], {key: -value or -9 for key, value in before.items()})


def test_differences_of_nested_settings_have_dotted_names():
    assert differences({"a": {"b": 1, "c": {}}}, {"a": {"b": 2, "c": {}}}) == ["a.b was 1 and is 2"]


def test_a_file_that_was_shortened_since_is_refused(tmp_path):
    filled(tmp_path)
    (tmp_path / "out.jsonl").write_bytes((tmp_path / "out.jsonl").read_bytes()[:-1])
    with pytest.raises(ValueError, match="was changed since"):
        opened(tmp_path)


def test_a_file_without_its_journal_is_not_overwritten(tmp_path):
    (tmp_path / "out.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists, but its journal"):
        opened(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "mine\n"


def test_a_broken_line_in_the_middle_of_a_journal_is_named(tmp_path):
    filled(tmp_path)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join([*lines[:2], b"oops\n", *lines[2:]]))
    with pytest.raises(ValueError, match=rf"{JOURNAL}, line 3: not a JSON object"):
        opened(tmp_path)


def test_a_second_writer_is_refused_while_the_first_one_writes(tmp_path):
    with opened(tmp_path), pytest.raises(ValueError, match="another process is writing"):
        opened(tmp_path)
    opened(tmp_path).close()


def test_text_that_utf8_cannot_hold_is_kept(tmp_path):
    odd = "half of a pair: \ud83d, and a separator: \u2028"
    with opened(tmp_path) as ledger:
        ledger.add([Entry(0, {"out.jsonl": [{"text": odd}]}, {})])
    assert read_lines(tmp_path / JOURNAL, "out.jsonl") == [{"text": odd}]
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 1
