"""The page to label failures, as two annotators use it in a browser."""

from __future__ import annotations

import json
import shutil

import pytest

from memgen.analysis.labels import (
    BELIEF,
    COMPOSITION,
    NONE,
    PLANNING,
    collect_failures,
    combine,
    read_labels,
    write_failures,
)
from mlflow_pages import CHROMIUM

pytestmark = pytest.mark.browser

HOSTILE = "</script><script>document.title='owned'</script><img src='http://127.0.0.1:9/x' onerror='document.title=1'><!-- &amp;"


@pytest.fixture(scope="module")
def failures():
    answers = {
        index: {
            "index": index,
            "id": f"item-{index}",
            "task": HOSTILE,
            "reward": 0.0,
            "failure": "cut off",
            "text": f"{HOSTILE}{index}",
            "messages": [
                {"role": HOSTILE, "content": f"question {index}"},
                {"role": "assistant", "content": f"{HOSTILE}{index}"},
            ],
        }
        for index in range(3)
    }
    return collect_failures({"as it is": answers}, ["as it is"], lambda index: f"{HOSTILE} {index}", seed=0)


@pytest.fixture(scope="module")
def browser():
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium, or set MEMGEN_CHROMIUM")
    pytest.importorskip("playwright", reason="no playwright: pip install -c constraints.txt -e .[dev]")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield one
        one.close()


@pytest.fixture
def asked() -> list[str]:
    """Addresses that the page asked for."""
    return []


@pytest.fixture
def page(browser, failures, tmp_path, asked):
    write_failures(failures, HOSTILE, tmp_path)
    one = browser.new_page()
    one.set_default_timeout(120_000)
    one.on("request", lambda request: asked.append(request.url))
    one.goto((tmp_path / "label.html").as_uri())
    yield one
    one.close()


def status(page) -> str:
    return page.locator("#status").inner_text()


def saved(page, folder):
    """The file that the page offers when `s` is pressed."""
    with page.expect_download() as download:
        page.keyboard.press("s")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def annotate_as(page, name):
    page.locator("#annotator").fill(name)
    page.locator("#annotator").press("Enter")


def test_texts_are_shown_as_texts_and_nothing_is_asked_of_a_network(page, failures, asked):
    assert f"{HOSTILE}{failures[0].item[-1]}" in page.locator("#messages").inner_text()
    assert HOSTILE in page.locator("#title").inner_text()
    assert HOSTILE in page.locator("#about").inner_text()
    assert HOSTILE in page.locator("#reference").inner_text()
    assert page.title() == "Label failures"
    assert page.locator("img").count() == 0
    assert [url for url in asked if not url.startswith("file:")] == []


def test_two_annotators_label_by_keys_save_files_and_load_them_again(page, failures, tmp_path):
    for key in "102":
        page.keyboard.press(key)
    assert status(page) == "A: 3 of 3 labelled, not saved"
    first = saved(page, tmp_path)
    assert first.name == "labels-A.json"
    assert status(page) == "A: 3 of 3 labelled"
    annotate_as(page, "B two")
    assert status(page) == "B two: 0 of 3 labelled"
    page.keyboard.press("1")
    page.keyboard.press("ArrowRight")
    page.get_by_role("button", name=BELIEF).click()
    page.keyboard.press("n")
    assert page.locator("#place").inner_text() == "2 of 3"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#types [aria-pressed=true]").inner_text().endswith(PLANNING)
    page.keyboard.press("Backspace")
    page.keyboard.press("8")
    second = saved(page, tmp_path)
    assert second.name == "labels-B_two.json"
    ids = [failure.id for failure in failures]
    given = [read_labels(first), read_labels(second)]
    assert given[0].labels == dict(zip(ids, [PLANNING, NONE, COMPOSITION], strict=True))
    assert given[1].labels == {ids[0]: BELIEF, ids[2]: BELIEF}
    assert combine(failures, given).agreements[0].failures == 2

    # Both go on in a page that knows nothing of them yet.
    page.reload()
    assert status(page) == "A: 0 of 3 labelled"
    page.locator("#load").set_input_files(second)
    page.get_by_text("B two: 2 of 3 labelled").wait_for()
    page.keyboard.press("n")
    page.keyboard.press("1")
    assert status(page) == "B two: 3 of 3 labelled, not saved"
    assert read_labels(saved(page, tmp_path)).labels == {ids[0]: BELIEF, ids[1]: PLANNING, ids[2]: BELIEF}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "no json", "cannot be loaded"),
        (lambda text: json.dumps({**json.loads(text), "export": "x"}), "its labels are of another export"),
        (lambda text: text.replace(PLANNING, "boredom"), "it has an unknown failure or type"),
        (lambda text: text.replace("memgen labels 1", "else"), "it is no file of labels"),
    ],
    ids=["no JSON", "another export", "an unknown type", "another format"],
)
def test_a_file_that_does_not_fit_changes_nothing(page, tmp_path, change, message):
    page.keyboard.press("1")
    path = saved(page, tmp_path)
    path.write_text(change(path.read_text()))
    page.locator("#load").set_input_files(path)
    page.get_by_text(message).wait_for()
    page.keyboard.press("ArrowRight")
    assert status(page) == "A: 1 of 3 labelled"
