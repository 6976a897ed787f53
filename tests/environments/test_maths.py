# ruff: noqa: RUF001 - answers in other digits and symbols.
from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memgen.environments.qa.maths import MathsVerifier, final_answer
from memgen.environments.qa.multiple_choice import chosen_letter


@pytest.fixture(scope="module")
def verifier():
    verifier = MathsVerifier(timeout_s=10.0)
    yield verifier
    verifier.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3}, no: \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),
        ("work\n#### 72", "72"),
        ("#### 1\n#### 2\n", "2"),
        ("#### 5.", "5"),
        (r"$\fbox{5}$", "5"),
        (r"$\boxed 5$ apples", "5"),
        (r"\boxed 12", "12"),
        ("#### 7\n" + r"\boxed{5}", "5"),
        (r"\boxed{5}" + "\n#### 7", "5"),
        ("the answer is 5", None),
        (r"\boxed{5}, as asked in \boxed{}", "5"),
        ("#### 5\n" + r"\boxed{ }", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{\{5 \}}", r"\{5 \}"),
        (r"\boxed{5} } \boxed{3", "5"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        ("##### 5", None),
        ("it is #### 5", None),
        ("####", None),
        ("", None),
    ],
)
def test_only_the_last_complete_box_or_hashes_line_is_the_final_answer(text, answer):
    assert final_answer(text) == answer


@given(st.text(alphabet="ab{}\\ \n#1."), st.text(alphabet="0123456789/+", min_size=1))
def test_a_box_at_the_end_of_any_text_is_its_final_answer(text, answer):
    # A backslash at the end of the text would escape the box's.
    assert final_answer(text.rstrip("\\") + "\n\\boxed{" + answer + "}") == answer


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1,200", "1200", True),
        ("1200", "1,200", True),
        ("0.5", r"\frac{1}{2}", True),
        ("5", r"\$5", True),
        ("5", r"5\text{ apples}", True),
        ("5", "5.00", True),
        ("-3", "-3", True),
        ("5", "x = 5", True),
        (r"\frac \pi4 + 2 - \sqrt2", r"\frac \pi4+2 - \sqrt2", True),
        ("5", "3", False),
        ("5", "3 or 5", False),
        ("5", "3, 5", False),
        ("5", "eggs", False),
        ("5", r"\frac{", False),
    ],
)
def test_answers_are_compared_as_mathematics(verifier, gold, answer, equal):
    assert verifier.equivalent(gold, answer) is equal


RIGHT = {
    "full stops": [("5.", "5"), (r"\frac{1}{2}.", "0.5"), ("x^2+1.", "x^2+1"), (r"\text{Friday}", "Friday.")],
    "units in words": [
        ("18", "18 dollars"), ("50", "50 people"), ("50", "50 miles per hour"), ("50", "50 km/h"),
        ("50", r"\text{50 people}"), ("36", "36 square units"), ("36", "36 cm²"), ("36", r"36\text{ cm}^2"),
        (r"36\text{ cm}^2", "36"), (r"5.4 \text{ cents}", "5.4 cents"), ("5000000", "5 million people"),
        (r"864 \mbox{ inches}^2", "864 square inches"),
    ],
    "words before it": [
        ("10", r"\approx 10"), ("10", r"x \approx 10"), ("18", "Answer: 18"), ("36", r"\text{Area} = 36"), ("18", "= 18"),
    ],
    "marks around it": [("73", "**73**"), ("73", "*73*"), ("73", r"\(73\)"), ("73", r"\textbf{73}")],
    "currencies": [("18", r"\text{\$}18"), ("18", "€18"), ("18", "£18"), ("18", "$18"), (r"\$36", "36")],
    "other digits and symbols": [
        ("73", "７３"), ("73", "٧٣"), (r"\infty", "∞"), (r"(-\infty,2]", "(-∞,2]"), (r"2\pi", "2π"), ("x^2", "x²"),
        ("-3", "−3"), (r"\frac{3}{4}", "¾"), (r"2516_8", "2516₈"), ("6", "2×3"),
    ],
    "thousands": [("1000", r"1\,000"), ("1000", "1{,}000"), ("1000", "1,000"), (r"11,\! 111", "11111"), ("10000", "10 000")],
    "mixed numbers": [(r"\frac{25}{2}", "12 1/2"), ("12.5", r"12\frac{1}{2}"), (r"\frac{14}{3}", "4 2/3"), ("2.5", "2½")],
    "roots": [(r"2\sqrt{3}", "2√3"), (r"\sqrt{51}", r"\sqrt51"), (r"2\sqrt{13}", "2√(13)"), (r"\sqrt{2}", "sqrt(2)")],
    "degrees": [(r"\frac{\pi}{2}", r"90^\circ"), (r"90^\circ", r"\frac{\pi}{2}"), ("90", "90°"), (r"90^\circ", "90 degrees")],
    "bases": [("2516_8", r"2516_{8}"), ("2516_8", r"2516_{\text{eight}}"), ("255", "255_{10}")],
    "sets": [(r"\{1,2\}", r"\{2,1\}"), (r"\{1,2\}", "2,1"), ("(1,2)", r"\left( 1, 2 \right)")],
    "small numbers": [(r"\frac{1}{2^{98}}", "2^{-98}"), (r"\frac{1}{2006!}", r"\dfrac1{2006!}"), ("0", r"\sqrt6-\sqrt2\sqrt3")],
}  # fmt: skip
WRONG = {
    "units": [
        ("18", "18 dollars and 5 cents"), ("50", "2 groups of 25"), ("5", "5 million"), ("5", "at least 5"),
        (r"864 \mbox{ inches}^2", r"864 \mbox{ inches}^3"), ("50 km", "50 miles"), ("5", "5x"), ("50", "50 or 60 people"),
    ],
    "words": [("0", "maybe 5 0"), ("0", r"\text{maybe }5\ 0"), (r"\text{Evelyn}", "nylevE"), (r"\text{even}", "odd")],
    "bases": [
        ("2516_8", "2516"), ("2516_8", "2516_9"), ("2516_8", "2515_8"), ("2516", "2516_8"), ("3_4, 5_6", "3_5, 5_6"),
    ],
    "small numbers": [
        (r"\frac{1}{2006!}", r"\frac{1}{2004!}"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("0", "10^{-20}"),
        (r"\frac{x}{2^{98}}", r"\frac{x}{2^{99}}"), (r"\{\frac{1}{2^{98}}\}", r"\{\frac{1}{2^{99}}\}"), (".0000672", ".0000673"),
    ],
    "brackets": [(r"\{1,2\}", "(1,2)"), ("(1,2)", r"\{1,2\}"), ("(1,2)", "(2,1)"), ("[2,7]", "(2,7)")],
    "degrees": [(r"\frac{\pi}{2}", r"45^\circ"), (r"\frac{\pi}{2}", "90"), ("90", r"\frac{\pi}{2}")],
    "digits": [(r"\frac13", "0.333"), ("1000000", "1000001"), ("15", "1,5")],
}  # fmt: skip


@pytest.mark.parametrize("pairs", RIGHT.values(), ids=RIGHT)
def test_what_a_careful_grader_calls_right_is_right(verifier, pairs):
    assert [pair for pair in pairs if not verifier.equivalent(*pair)] == []


@pytest.mark.parametrize("pairs", WRONG.values(), ids=WRONG)
def test_what_a_careful_grader_calls_wrong_is_wrong(verifier, pairs):
    assert [pair for pair in pairs if verifier.equivalent(*pair)] == []


BLOCKS = [
    "\\boxed{",
    "\\boxed{}",
    "\\boxed{ }",
    "{",
    "\\",
    "\\boxed ",
    "#### ",
    "####\n",
    " ",
    "\n",
    "\\text{",
    "**",
    "`",
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("\\boxed{", "}")], ids=["alone", "boxed"])
@pytest.mark.parametrize("read", [final_answer, chosen_letter])
def test_reading_an_answer_takes_time_in_proportion_to_its_length(read, block, before, after):
    def seconds(number):
        start = time.process_time()
        read(before + block * number + after)
        return time.process_time() - start

    short = min(seconds(20_000) for _ in range(2))
    assert min(seconds(40_000) for _ in range(2)) < 3 * short + 0.05


def test_an_answer_of_a_million_characters_is_wrong_and_takes_no_worker():
    verifier = MathsVerifier()
    reward = verifier.reward("5", "\\boxed{" + "5" * 1_000_000 + "}")
    assert (reward.total, reward.parts["has_answer"]) == (0.0, 1.0)
    assert verifier.worker_pids == ()


def test_the_reference_comes_first_because_the_order_matters(verifier):
    assert verifier.equivalent("5", "4 = 5")
    assert not verifier.equivalent("4 = 5", "5")


def test_text_without_a_marked_answer_is_wrong_and_starts_no_worker():
    verifier = MathsVerifier()
    assert not verifier.correct("5", "I think it is 5")
    assert verifier.worker_pids == ()


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "{" * 2000 + "5" + "}" * 2000], ids=["power", "braces"])
def test_a_hung_comparison_is_wrong_and_the_next_one_is_answered_by_a_new_worker(answer):
    verifier = MathsVerifier(timeout_s=2.0)
    assert verifier.correct("5", r"\boxed{5}")
    (hung,) = verifier.worker_pids
    start = time.monotonic()
    assert not verifier.correct("5", f"\\boxed{{{answer}}}")
    assert time.monotonic() - start < 60
    assert not _is_running(hung)
    assert verifier.correct("5", r"\boxed{5}")
    assert verifier.worker_pids != (hung,)
    verifier.close()


def test_a_worker_that_died_is_replaced():
    verifier = MathsVerifier()
    assert verifier.correct("5", r"\boxed{5}")
    (pid,) = verifier.worker_pids
    os.kill(pid, signal.SIGKILL)
    while _is_running(pid):  # It is reaped by the next question at the latest.
        time.sleep(0.01)
        if verifier.correct("5", r"\boxed{5}") and verifier.worker_pids != (pid,):
            break
    assert verifier.correct("5", r"\boxed{5}")
    verifier.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_schedulers_warning_is_not_for_the_worker(verifier, number):
    assert verifier.correct("5", r"\boxed{5}")
    pids = verifier.worker_pids
    for pid in pids:
        os.kill(pid, number)
    assert verifier.correct("5", r"\boxed{5}")
    assert verifier.worker_pids == pids


def test_any_thread_may_ask_and_gets_its_own_answer():
    verifier = MathsVerifier(workers=2)
    questions = [(str(i % 7), f"\\boxed{{{i % 5}}}") for i in range(60)]
    with ThreadPoolExecutor(max_workers=8) as threads:
        verdicts = list(threads.map(lambda question: verifier.correct(*question), questions))
    assert verdicts == [i % 7 == i % 5 for i in range(60)]
    assert len(verifier.worker_pids) <= 2
    verifier.close()
    assert verifier.worker_pids == ()


def test_closing_or_dropping_a_verifier_ends_its_workers():
    verifier = MathsVerifier()
    verifier.correct("5", r"\boxed{5}")
    (pid,) = verifier.worker_pids
    verifier.close()
    assert not _is_running(pid)
    assert verifier.correct("5", r"\boxed{5}"), "a closed verifier starts again when it is asked"
    (pid,) = verifier.worker_pids
    del verifier
    assert not _is_running(pid)


def test_a_copy_has_workers_of_its_own(verifier):
    assert verifier.correct("5", r"\boxed{5}")
    for duplicate in (copy.deepcopy(verifier), pickle.loads(pickle.dumps(verifier))):
        assert duplicate.timeout_s == verifier.timeout_s
        assert duplicate.worker_pids == ()


def test_a_program_that_ends_takes_its_workers_along_even_without_a_main_guard(tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "from memgen.environments.qa.maths import MathsVerifier\n"
        "verifier = MathsVerifier()\n"
        "print(verifier.correct('5', '#### 5'), *verifier.worker_pids)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
        timeout=120,
    )
    verdict, pid = done.stdout.split()
    assert verdict == "True"
    assert not _is_running(int(pid))


def test_a_program_that_is_killed_leaves_no_worker():
    code = (
        "from memgen.environments.qa.maths import MathsVerifier\n"
        "verifier = MathsVerifier()\n"
        "verifier.correct('5', '#### 5')\n"
        "print(*verifier.worker_pids, flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as program:
        pid = int(program.stdout.readline())
        program.kill()
    deadline = time.monotonic() + 60
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_asks_workers_of_its_own(verifier):
    assert verifier.correct("5", r"\boxed{5}")
    pids = verifier.worker_pids
    child = os.fork()
    if child == 0:
        own = verifier.correct("5", r"\boxed{5}") and verifier.worker_pids != pids
        verifier.close()
        os._exit(0 if own else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifier.correct("5", r"\boxed{5}")
    assert verifier.worker_pids == pids


def test_a_checker_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"could not be started.*broken on purpose"):
        MathsVerifier().correct("5", r"\boxed{5}")


@pytest.mark.parametrize(
    ("argument", "value"), [("timeout_s", 0.0), ("timeout_s", float("inf")), ("workers", 0)]
)
def test_settings_out_of_range_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        MathsVerifier(**{argument: value})


def test_the_reward_imports_neither_torch_nor_transformers():
    code = (
        "import sys, memgen.environments.qa.gsm8k\n"
        "bad = {'torch', 'transformers', 'peft', 'lightning', 'datasets', 'math_verify'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_no_thread_is_left_behind():
    before = threading.active_count()
    verifier = MathsVerifier()
    verifier.correct("5", r"\boxed{5}")
    verifier.close()
    assert threading.active_count() == before


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
