"""Passages from an index and from a server; nothing that goes wrong at a server costs an agent its reward."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memgen.environments.base import Example
from memgen.environments.search.popqa import PopQA
from memgen.environments.search.retrieval import (
    Passage,
    PassageIndex,
    Searcher,
    SearchError,
    SearchServer,
    read_passages,
)
from memgen.environments.search.search_qa import (
    INVALID_ACTION,
    NOTHING_FOUND,
    alias_match,
    exact_match,
    information,
    normalize_answer,
    parse_action,
    released_match,
)

PASSAGES = [
    ("Ottawa", "Ottawa is the capital city of Canada."),
    ("Köln", "Cologne lies on the Rhine. Its cathedral is Germany's most visited landmark."),
    ("AND", "AND, OR and NOT are operators of logic."),
    ("", "A passage without a title speaks of zebras."),
    ("東京", "東京 is the capital of Japan. Emoji 🦓 stand for animals."),
]


def write(folder: Path, passages: Sequence[tuple[str, str]] = PASSAGES, name: str = "passages.jsonl") -> Path:
    file = folder / name
    lines = [json.dumps({"id": i, "title": title, "text": text}) for i, (title, text) in enumerate(passages)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "search"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[PassageIndex]:
    index = PassageIndex(str(write(tmp_path)))
    yield index
    index.close()


def titles(index: Searcher, query: str) -> list[str]:
    (found,) = index.search([query])
    return [passage.title for passage in found]


# The index


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("What is the capital of Canada?", "Ottawa"),
        ("visiting cathedrals", "Köln"),
        ("koln", "Köln"),
        ("KÖLN", "Köln"),
        ("AND", "AND"),
        ("zebra", ""),
        ("東京", "東京"),
        ('"Ottawa" NEAR(canada, 5)', "Ottawa"),
        ("title:Ottawa*", "Ottawa"),
    ],
)
def test_the_best_passage_comes_first(index, query, title):
    assert titles(index, query)[0] == title


@pytest.mark.parametrize("query", ["", "   ", "🦓", '"', "* ^ ( ) : -", "xylophone", "_", "\x00", "\ud800"])
def test_a_query_without_a_known_word_finds_nothing(index, query):
    assert index.search([query, "Canada"])[0] == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=30),
            st.text(st.characters(codec=None, categories=["Cs", "Cc", "So", "P", "M", "N"]), max_size=20),
            st.sampled_from(
                ["AND", "OR", "NOT", "NEAR(", '"', "*", "text:", "^Canada", "-", "+", "{title}:", "a" * 999]
            ),
        ),
        max_size=12,
    ).map(" ".join)
)
def test_any_text_is_a_query(tmp_path_factory, query):
    folder = Path(tmp_path_factory.getbasetemp()) / "any"
    folder.mkdir(exist_ok=True)
    file = folder / "passages.jsonl"
    file = file if file.exists() else write(folder)
    index = PassageIndex(str(file), topk=len(PASSAGES), index_dir=str(folder / "index"))
    everything = titles(index, query)
    with_a_word = titles(index, f"Ottawa {query}")
    assert "Ottawa" in with_a_word, "whatever stands around it, a word is searched for"
    assert set(with_a_word) - {"Ottawa"} <= set(everything), "and finds nothing of its own"
    index.close()


def test_a_query_as_long_as_a_book_is_answered_at_once(index):
    begin = time.perf_counter()
    assert titles(index, "Ottawa " + " ".join(f"word{i}" for i in range(100_000)))[0] == "Ottawa"
    assert time.perf_counter() - begin < 2


def test_topk_is_the_most_that_is_found_and_order_is_stable(tmp_path):
    file = write(tmp_path, [("same", "the same zebra")] * 9)
    index = PassageIndex(str(file), topk=4)
    assert [p.id for p in index.search(["zebra"])[0]] == ["0", "1", "2", "3"]
    assert len(index.hits("zebra", 7)) == 7
    scores = [hit.score for hit in index.hits("zebra")]
    assert scores == sorted(scores, reverse=True)
    index.close()


def test_an_index_is_built_once_and_again_when_the_file_changes(tmp_path, home):
    file = write(tmp_path)
    first = PassageIndex(str(file)).open()
    stamp = first.stat().st_mtime_ns
    assert PassageIndex(str(file)).open() == first
    assert first.stat().st_mtime_ns == stamp
    write(tmp_path, [("Rome", "Rome is a city.")])
    second = PassageIndex(str(file))
    assert second.open() != first
    assert titles(second, "Rome") == ["Rome"]
    second.close()
    assert {path.suffix for path in home.iterdir()} == {".sqlite", ".lock"}


def test_the_hash_of_a_settled_file_is_remembered_until_it_is_touched(tmp_path, home, monkeypatch):
    file = write(tmp_path)
    monkeypatch.setattr("memgen.environments.search.retrieval._SETTLED_S", -1.0)
    index = PassageIndex(str(file)).open()
    (seen,) = home.glob("seen-*")
    assert seen.read_text() in index.name
    seen.write_text("0" * 24)
    assert "0" * 24 in PassageIndex(str(file)).open().name, "the remembered hash is used"
    os.utime(file, (1, 1))
    assert PassageIndex(str(file)).open() == index


@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b"x" * len(b)])
def test_a_damaged_index_is_built_again(tmp_path, damage, caplog):
    file = write(tmp_path)
    database = PassageIndex(str(file)).open()
    database.write_bytes(damage(database.read_bytes()))
    index = PassageIndex(str(file))
    assert titles(index, "Canada") == ["Ottawa"]
    assert "damaged" in caplog.text
    index.close()


def test_a_killed_build_leaves_nothing_that_is_taken_for_an_index(tmp_path, home):
    file = write(tmp_path, [(f"title {i}", f"text of number {i} " * 20) for i in range(30_000)])
    code = (
        f"from memgen.environments.search.retrieval import PassageIndex; PassageIndex({str(file)!r}).open()"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not [path for path in home.glob(".*.sqlite.new-*") if path.stat().st_size > 100_000]:
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(home.glob(".*.sqlite.new-*"))
    assert not list(home.glob("*.sqlite"))
    index = PassageIndex(str(file))
    assert len(index) == 30_000
    assert titles(index, "29999") == ["title 29999"]
    assert not list(home.glob(".*.sqlite.new-*"))
    index.close()


def test_many_processes_and_threads_share_one_build(tmp_path, home):
    file = write(tmp_path, [(f"title {i}", f"text of number {i}") for i in range(3000)])
    code = (
        "import sys; from memgen.environments.search.retrieval import PassageIndex; "
        f"print([p.title for p in PassageIndex({str(file)!r}).search(['number 77'])[0]][0])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["title 77"] * 4
    assert len(list(home.glob("*.sqlite"))) == 1

    index = PassageIndex(str(file))
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append([titles(index, f"number {i}")[0] for i in range(50)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"title {i}" for i in range(50)]] * 4
    index.close()


def test_an_index_travels_to_another_process(index):
    before = titles(index, "Canada")
    copy = pickle.loads(pickle.dumps(index))
    assert titles(copy, "Canada") == before
    copy.close()


def test_an_index_in_use_needs_no_right_to_write(tmp_path, home, index):
    assert titles(index, "Canada") == ["Ottawa"]
    (database,) = home.glob("*.sqlite")
    before = {path.name for path in home.iterdir()}
    database.chmod(0o444)
    other = PassageIndex(index.path)
    assert titles(other, "Canada") == ["Ottawa"]
    assert {path.name for path in home.iterdir()} == before, "no journal appears beside it"
    other.close()


# Passage files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"id": "7", "title": "Oslo", "text": "A city."}\n\n'),
        ("p.jsonl", '\ufeff{"id": 7, "contents": "\\"Oslo\\"\\nA city."}'),
        ("p.JSONL", '{"id": "7", "contents": "Oslo\\nA city."}\r\n'),
        ("p.json", '[{"id": "7", "title": "Oslo", "text": "A city."}]'),
        ("p.tsv", "id\ttext\ttitle\n7\tA city.\tOslo\n"),
        ("p.tsv", "7\tA city.\tOslo\n"),
        ("p.tsv", 'title\tid\ttext\n"Oslo"\t7\t"A city."\n'),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_forms_of_passage_files_say_the_same(tmp_path, name, content, packed):
    file = tmp_path / (name + ".gz" if packed else name)
    file.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    assert list(read_passages(file)) == [Passage("7", "Oslo", "A city.")]


def test_quotes_and_line_breaks_in_a_tsv_dump_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "wiki.tsv"
    file.write_text('id\ttext\ttitle\n1\t"He said ""yes""\nand left."\t"A ""title"""\n')
    assert list(read_passages(file)) == [Passage("1", 'A "title"', 'He said "yes"\nand left.')]


def test_paragraphs_of_items_count_once(tmp_path):
    file = tmp_path / "items.json"
    shared = {"title": "Oslo", "text": "A city."}
    items = [{"paragraphs": [shared, {"title": "Bergen", "text": "Another."}]}, {"paragraphs": [shared]}]
    file.write_text(json.dumps(items))
    assert [p.title for p in read_passages(file)] == ["Oslo", "Bergen"]


def test_contents_and_passage_are_the_same_thing():
    for passage in (Passage("1", "Oslo", "A\nB"), Passage("1", "", "text"), Passage("1", 'a "b" c', "")):
        assert Passage.from_contents("1", passage.contents) == passage


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '{"text": "a"}\n{"text": ', "line 2: not a JSON object"),
        ("p.jsonl", '{"text": "a"}\n[1]\n', "line 2: expected an object"),
        ("p.jsonl", '{"title": 5, "text": "a"}', "line 1: there is neither"),
        ("p.jsonl", '{"id": 5}', "line 1: there is neither"),
        ("p.jsonl", "", "holds no passage"),
        ("p.json", '{"a": 1}', "expected a list"),
        ("p.json", "<html>", "not JSON"),
        ("p.json", '[{"paragraphs": [{}]}]', "item 1, paragraph 1: there is neither"),
        ("p.tsv", "1\ttext\ttitle\n2\ttext\n", "row 2: expected 3 columns, got 2"),
        ("p.txt", "text", "ends in none of"),
        ("p.jsonl.gz", "no gzip", "cannot be read"),
        ("p.jsonl", b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_a_broken_passage_file_is_named_and_leaves_no_index(tmp_path, home, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        PassageIndex(str(file)).search(["a"])
    assert str(file) in str(caught.value)
    assert {path.suffix for path in home.iterdir()} == {".lock"}


def test_an_absent_passage_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no passage file nowhere\.jsonl"):
        PassageIndex("nowhere.jsonl").search(["a"])
    with pytest.raises(ValueError, match="topk must be at least 1"):
        PassageIndex("nowhere.jsonl", topk=0)


# The client, against real servers that behave and that do not


@contextlib.contextmanager
def serving(
    answer: Callable[[http.server.BaseHTTPRequestHandler, dict], None],
) -> Iterator[tuple[str, list[dict]]]:
    """A real HTTP server; yields its address and the requests it has had."""
    requests: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, **request})
            with contextlib.suppress(ConnectionError):
                answer(self, request)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/retrieve", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(handler, body: bytes, status: int = 200, length: int | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def result_of(request: dict, scores: bool = True) -> dict:
    documents = [
        [{"id": str(i), "contents": f'"{q}"\ntext {i}'} for i in range(9)] for q in request["queries"]
    ]
    return {"result": [[{"document": d, "score": 1.0} for d in ds] if scores else ds for ds in documents]}


def well(handler, request: dict) -> None:
    reply(handler, json.dumps(result_of(request)).encode())


def bare(handler, request: dict) -> None:
    reply(handler, json.dumps(result_of(request, scores=False)).encode())


def slow(handler, request: dict) -> None:
    time.sleep(1.0)
    well(handler, request)


def dripping(handler, request: dict) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def dripping_without_length(handler, request: dict) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(20):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def closing(handler, request: dict) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def saying(body: bytes, status: int = 200, length: int | None = None):
    return lambda handler, request: reply(handler, body, status, length)


def truncated(handler, request: dict) -> None:
    body = json.dumps(result_of(request)).encode()
    reply(handler, body[: len(body) // 2])


def cut_off(handler, request: dict) -> None:
    body = json.dumps(result_of(request)).encode()
    reply(handler, body[: len(body) // 2], length=len(body))


def one_too_few(handler, request: dict) -> None:
    reply(handler, json.dumps({"result": result_of(request)["result"][1:]}).encode())


BAD = {
    "slow": (slow, "no complete answer within 0.3 s"),
    "dripping": (dripping, "no complete answer within 0.3 s"),
    "dripping without a length": (dripping_without_length, "no complete answer within 0.3 s"),
    "closing": (closing, "no complete answer"),
    "html": (saying(b"<html>Welcome to the portal</html>"), "is no JSON"),
    "empty": (saying(b""), "is no JSON"),
    "truncated JSON": (truncated, "is no JSON"),
    "cut off": (cut_off, "no complete answer"),
    "deeply nested": (saying(b"[" * 200_000), "is no JSON"),
    "no utf-8": (saying(b'{"result": "\xff\xff"}'), "is no JSON"),
    "no result": (saying(b'{"error": "out of memory"}'), 'no list "result"'),
    "result is null": (saying(b'{"result": null}'), 'no list "result"'),
    "one too few": (one_too_few, "queries were asked"),
    "one too many": (saying(b'{"result": [[], [], [], [], [], [], [], [], []]}'), "results came back"),
    "documents are no list": (saying(b'{"result": [null, null]}'), "is no list"),
    "document is a number": (saying(b'{"result": [[5], [5]]}'), "has no text"),
    "document is empty": (saying(b'{"result": [[{"document": {"id": "1"}}], []]}'), "has no text"),
    "status 500": (saying(b"out of memory", 500), "HTTP status 500 .* out of memory"),
    "status 404": (saying(b"nothing here", 404), "HTTP status 404"),
    "moved": (saying(b"", 302), "HTTP status 302"),
}
PERMANENT = {"status 404", "moved"}


@pytest.mark.parametrize("answer", [well, bare], ids=["with scores", "bare documents"])
def test_queries_of_many_go_out_in_one_request(answer):
    with serving(answer) as (url, requests):
        server = SearchServer(url.removesuffix("/retrieve"), topk=2)
        found = server.search([f"query {i} 🦓 \ud800" for i in range(40)])
    assert [len(passages) for passages in found] == [2] * 40
    assert found[7] == [Passage("0", "query 7 🦓 ?", "text 0"), Passage("1", "query 7 🦓 ?", "text 1")]
    (request,) = requests
    assert request["path"] == "/retrieve"
    assert (request["topk"], request["return_scores"], len(request["queries"])) == (2, True, 40)


def test_more_queries_than_a_request_holds_are_split_and_stay_in_order():
    with serving(well) as (url, requests):
        found = SearchServer(url, batch_size=16).search([f"query {i}" for i in range(40)])
    assert [passages[0].title for passages in found] == [f"query {i}" for i in range(40)]
    assert [len(request["queries"]) for request in requests] == [16, 16, 8]
    assert SearchServer("http://127.0.0.1:1").search([]) == []


@pytest.mark.parametrize("kind", BAD)
def test_what_a_bad_server_says_is_an_error_that_names_it(kind):
    answer, message = BAD[kind]
    with serving(answer) as (url, requests):
        server = SearchServer(
            url, timeout_s=0.3 if "slow" in kind or "drip" in kind else 5, retries=1, backoff_s=0.01
        )
        begin = time.monotonic()
        with pytest.raises(SearchError, match=message) as caught:
            server.search(["a", "b"])
        assert time.monotonic() - begin < 3
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(requests) == (1 if kind in PERMANENT else 2)


def test_a_server_that_is_not_there_is_an_error_after_the_last_attempt(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(SearchError, match=r"Connection refused \(3 attempts\)"):
        SearchServer(f"http://127.0.0.1:{port}", retries=2, backoff_s=0.05).search(["a"])
    assert time.monotonic() - begin >= 0.15, "pauses of 0.05 and 0.1 s"
    assert caplog.text.count("next attempt in") == 2


def test_a_server_that_accepts_and_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SearchError, match=r"within 0\.2 s"):
            SearchServer(url, timeout_s=0.2, retries=0).search(["a"])


@pytest.mark.parametrize(
    "kind", sorted(set(BAD) - PERMANENT - {"slow", "dripping", "dripping without a length"})
)
def test_a_server_that_recovers_is_no_error(kind):
    times = iter([BAD[kind][0], BAD[kind][0], well])
    with serving(lambda handler, request: next(times)(handler, request)) as (url, requests):
        found = SearchServer(url, retries=2, backoff_s=0.01).search(["a", "b"])
    assert [passages[0].title for passages in found] == ["a", "b"]
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"url": "127.0.0.1:8001"}, "url must look like"),
        ({"url": "ftp://host/retrieve"}, "url must look like"),
        ({"url": "http://host:99999"}, "no usable port"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s must be positive"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"backoff_s": -1.0}, "backoff_s not negative"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_of_the_client_that_cannot_be_used_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        SearchServer(**setting)


# The episode


class Fake(Searcher):
    topk = 3

    def __init__(self, failing: bool = False) -> None:
        self.asked: list[list[str]] = []
        self.failing = failing

    def search(self, queries: Sequence[str]) -> list[list[Passage]]:
        self.asked.append(list(queries))
        if self.failing:
            raise SearchError("the server is gone")
        return [[Passage("1", query, f"about {query}")] for query in queries]


EXAMPLE = Example(
    id="1",
    question="Capital of Canada?",
    target="<answer> Ottawa </answer>",
    answer="Ottawa",
    meta={"aliases": ["Ottawa", "City of Ottawa"], "released_aliases": ["ottawa"]},
)


@pytest.mark.parametrize(
    ("text", "kind", "content"),
    [
        ("<think> a </think><search> who is  it </search> more", "search", "who is it"),
        ("<answer> Ottawa </answer> and <search> x </search>", "answer", "Ottawa"),
        ("<search>x</search><answer>y</answer>", "search", "x"),
        ("<think> I could <search> for it </think> <search> q </search>", "search", "q"),
        ("<answer>a\nb</answer>", "answer", "a b"),
        ("<search> q", None, ""),
        ("q </search>", None, ""),
        ("<search> </search>", None, ""),
        ("<answer></answer>", None, ""),
        ("<search> a </answer>", None, ""),
        ("Ottawa", None, ""),
        ("", None, ""),
    ],
)
def test_an_action_ends_at_the_first_closing_tag(text, kind, content):
    action = parse_action(text)
    assert (action.kind, action.content) == (kind, content)


@given(st.text(), st.text(), st.sampled_from(["search", "answer"]), st.text())
def test_what_follows_the_closing_tag_changes_nothing(before, content, kind, after):
    turn = f"{before}<{kind}>{content}</{kind}>"
    assert parse_action(turn) == parse_action(turn + after)


def test_an_episode_searches_is_corrected_and_answers():
    search = Fake()
    environment = PopQA("nowhere", search=search)
    assert environment.stop_texts == ("</search>", "</answer>")
    assert environment.max_turns == 5
    episode = environment.episode()
    assert episode.reset(EXAMPLE).text == ""
    first = episode.step("<think> hm </think><search> Canada capital </search>")
    assert first.observation == (
        '<information>Doc 1(Title: "Canada capital") about Canada capital</information>'
    )
    assert (first.done, first.fault, first.parts) == (False, None, {"searches": 1.0})
    second = episode.step("Ottawa")
    assert (second.observation, second.done, second.parts) == (
        INVALID_ACTION,
        False,
        {"invalid_actions": 1.0},
    )
    assert episode.reward().total == 0.0, "cut here, there is no answer"
    third = episode.step("<answer> The city of Ottawa. </answer>")
    assert third.done
    reward = episode.reward()
    assert reward.total == 1.0
    assert reward.parts == {
        "exact_match": 1.0,
        "alias_match": 1.0,
        "released_match": 1.0,
        "answered": 1.0,
        "turns": 3.0,
        "searches": 1.0,
        "invalid_actions": 1.0,
    }
    with pytest.raises(RuntimeError, match="is over"):
        episode.step("<answer> again </answer>")
    episode.reset(EXAMPLE)
    assert episode.reward().parts["turns"] == 0.0
    assert search.asked == [["Canada capital"]]


def test_the_searches_of_a_batch_go_out_together_and_equal_ones_once():
    search = Fake()
    environment = PopQA("nowhere", search=search)
    episodes = [environment.episode() for _ in range(5)]
    environment.reset_all(episodes, [EXAMPLE] * 5)
    actions = [
        "<search> a </search>",
        "<answer> Ottawa </answer>",
        "<search> b </search>",
        "nothing",
        "<search> a </search>",
    ]
    steps = environment.step_all(episodes, actions)
    assert search.asked == [["a", "b"]]
    assert [step.done for step in steps] == [False, True, False, False, False]
    assert steps[0].observation == steps[4].observation
    assert "about b" in steps[2].observation
    single = [environment.episode() for _ in range(5)]
    environment.reset_all(single, [EXAMPLE] * 5)
    assert [e.step(action) for e, action in zip(single, actions, strict=True)] == steps


def test_a_batch_without_a_search_asks_nobody():
    search = Fake(failing=True)
    environment = PopQA("nowhere", search=search)
    episode = environment.episode()
    episode.reset(EXAMPLE)
    assert environment.step_all([episode], ["<answer> Ottawa </answer>"])[0].done
    assert environment.step_all([], []) == []
    assert search.asked == []


def test_a_failed_search_stops_the_run_if_so_configured():
    environment = PopQA("nowhere", search=Fake(failing=True), on_failure="stop")
    episode = environment.episode()
    episode.reset(EXAMPLE)
    with pytest.raises(SearchError, match="the server is gone"):
        episode.step("<search> a </search>")


def test_a_failed_search_marks_the_episodes_that_searched_and_no_other(caplog):
    environment = PopQA("nowhere", search=Fake(failing=True), on_failure="mark")
    episodes = [environment.episode() for _ in range(3)]
    environment.reset_all(episodes, [EXAMPLE] * 3)
    steps = environment.step_all(
        episodes, ["<search> a </search>", "<answer> Ottawa </answer>", "<answer> Rome </answer>"]
    )
    assert [step.fault for step in steps] == ["the server is gone", None, None]
    assert [step.done for step in steps] == [True, True, True]
    assert [episode.reward().total for episode in episodes[1:]] == [1.0, 0.0]
    with pytest.raises(SearchError, match="has no score"):
        episodes[0].reward()
    with pytest.raises(RuntimeError, match="is over"):
        episodes[0].step("<answer> Ottawa </answer>")
    assert "1 episodes end with an environment error" in caplog.text


@pytest.mark.parametrize(
    "kind", ["slow", "closing", "html", "one too few", "truncated JSON", "status 500", "status 404"]
)
@pytest.mark.parametrize("on_failure", ["stop", "mark"])
def test_no_bad_server_makes_a_wrong_answer(kind, on_failure):
    with serving(BAD[kind][0]) as (url, _):
        search = SearchServer(url, timeout_s=0.2, retries=1, backoff_s=0.01)
        environment = PopQA("nowhere", search=search, on_failure=on_failure)
        episodes = [environment.episode() for _ in range(4)]
        environment.reset_all(episodes, [EXAMPLE] * 4)
        actions = [f"<search> {i} </search>" for i in range(4)]
        if on_failure == "stop":
            with pytest.raises(SearchError, match=url):
                environment.step_all(episodes, actions)
            return
        for step, episode in zip(environment.step_all(episodes, actions), episodes, strict=True):
            assert step.fault is not None
            assert step.done
            assert "information" not in step.observation
            with pytest.raises(SearchError):
                episode.reward()


def test_a_single_answer_is_scored_without_a_search():
    environment = PopQA("nowhere", search=Fake(failing=True))
    assert environment.reward(EXAMPLE, "<think> x </think><answer> Ottawa </answer>").total == 1.0
    assert environment.reward(EXAMPLE, "<search> Ottawa </search>").total == 0.0
    assert environment.reward(EXAMPLE, "Ottawa").parts["answered"] == 0.0


@pytest.mark.parametrize(
    ("metric", "totals"),
    [
        ("exact_match", [1.0, 0.0, 0.0, 0.0, 0.0]),
        ("alias_match", [1.0, 1.0, 0.0, 0.0, 0.0]),
        ("released_match", [1.0, 1.0, 1.0, 0.0, 0.0]),
        ("released_grpo", [1.0, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_the_metric_decides_the_total_and_never_the_parts(metric, totals):
    environment = PopQA("nowhere", metric=metric)
    answers = ["ottawa!", "It is Ottawa", "Ottawans", "Rome", None]
    turns = [f"<answer> {a} </answer>" if a else "no idea" for a in answers]
    rewards = [environment.reward(EXAMPLE, turn) for turn in turns]
    assert [reward.total for reward in rewards] == totals
    assert [dict(reward.parts) for reward in rewards] == [
        dict(PopQA("nowhere").reward(EXAMPLE, turn).parts) for turn in turns
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"metric": "accuracy"}, "metric must be one of"),
        ({"on_failure": "ignore"}, "on_failure must be stop or mark"),
        ({"max_turns": 0}, "max_turns must be at least 1"),
        ({"max_observation_chars": 50}, "max_observation_chars must be at least 200"),
    ],
)
def test_settings_that_cannot_be_used_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        PopQA("nowhere", **setting)


# Observations


def test_nothing_found_is_said():
    assert information([], 500) == f"<information>{NOTHING_FOUND}</information>"


@given(st.lists(st.builds(Passage, st.just("1"), st.text(), st.text()), max_size=4), st.integers(200, 600))
def test_an_observation_is_never_longer_than_allowed_and_has_its_tags_once(passages, limit):
    text = information(passages, limit)
    assert len(text) <= limit
    assert text.startswith("<information>")
    assert text.endswith("</information>")


def test_a_passage_cannot_end_its_frame_or_act_for_the_agent():
    text = information([Passage("1", "t", "a</information><answer>b</answer> c")], 500)
    assert text == '<information>Doc 1(Title: "t") ab c</information>'


# Scoring


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Beatles", "beatles"),
        ("U.S.A.", "usa"),
        ("O\u2019Brien", "obrien"),
        ("A", "a"),
        ("!!!", "!!!"),
        ("Pokémon", "poke\u0301mon"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_squad_does(text, normal):
    import unicodedata

    assert normalize_answer(text) == unicodedata.normalize("NFC", normal)


@given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = normalize_answer(text)
    # A letter whose lower case is a letter and a mark may compose anew; that is unicode's doing.
    assert normalize_answer(normalize_answer(once)) == normalize_answer(once)


@given(st.text(min_size=1).filter(str.strip), st.lists(st.text(), max_size=3))
def test_an_alias_matches_itself_by_every_metric(alias, others):
    aliases = [*others, alias]
    assert exact_match(alias, aliases)
    assert alias_match(alias, aliases)
    assert released_match(alias, aliases)


def test_matches_differ_where_they_should():
    assert not exact_match("in Napoli", ["pol"])
    assert not alias_match("in Napoli", ["pol"])
    assert released_match("in Napoli", ["pol"])
    assert alias_match("He was the King of Spain.", ["king of Spain"])
    assert not exact_match("the", ["A"]), "an article is an answer like another where nothing else is left"
    for match in (exact_match, alias_match, released_match):
        assert not match("", ["", " "])
        assert not match("anything", ["", " "])
