"""Executors of answers: the sandbox, where bubblewrap is installed, and limits alone."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memgen.environments.code.answers import score
from memgen.environments.code.bigcodebench import BigCodeBench
from memgen.environments.code.execution import LimitedProcess, Program, RunLimits, base_python
from memgen.environments.code.kodcode import KodCode
from memgen.environments.code.sandbox import Bubblewrap

sandbox = [
    pytest.mark.sandbox,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]
DATA = (
    Path(os.environ.get("MEMGEN_SHARED", Path(__file__).parents[2].parent / "shared"))
    / "data"
    / "bigcodebench"
)
LIMITS = RunLimits(cpu_s=3, wall_s=6.0, memory_mb=1024)
TEST = "from solution import f\n\ndef test_f():\n    assert f(2) == 3\n"
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(params=["limits", pytest.param("bubblewrap", marks=sandbox)])
def executor(request):
    return LimitedProcess(LIMITS, 1) if request.param == "limits" else Bubblewrap(LIMITS)


@pytest.fixture
def bubblewrap():
    return Bubblewrap(LIMITS)


def processes() -> dict[str, str]:
    """Command lines by process id, without zombies."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if ") Z " not in (folder / "stat").read_text():
                found[folder.name] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # It ended meanwhile.
            continue
    return found


def runs_of_this_process() -> set[str]:
    """The process that each run under way was started as."""
    found = set()
    for pid, line in processes().items():
        with contextlib.suppress(OSError):
            parent = (Path("/proc") / pid / "stat").read_text().rsplit(")")[-1].split()[1]
            if "harness.py" in line and parent == str(os.getpid()):
                found.add(pid)
    return found


def parents() -> dict[str, str]:
    """The parent of every process, by process ids."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # It ended meanwhile.
            found[file.parent.name] = file.read_text().rsplit(")")[-1].split()[1]
    return found


def is_below(pid: str, ancestor: str, parents: dict[str, str]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor


def sandboxed(ancestor: int) -> set[str]:
    """Harness processes inside the sandboxes that a process has started."""
    above = parents()
    return {
        pid
        for pid, line in processes().items()
        if "/program.py" in line and "bwrap" not in line and is_below(pid, str(ancestor), above)
    }


def runs_at_their_solution(name: str) -> set[str]:
    """Of the processes that runs were started as, those below which a process calls itself `name`."""
    above = parents()
    named = set()
    for pid in above:
        with contextlib.suppress(OSError):  # It ended meanwhile.
            if (Path("/proc") / pid / "comm").read_text().strip() == name:
                named.add(pid)
    return {run for run in runs_of_this_process() if any(is_below(pid, run, above) for pid in named)}


def run(executor, solution, tests=TEST, style="pytest"):
    return executor.run(Program(solution, tests, style))


PASSING = {
    "plain": TEST,
    "parametrize": "import pytest\nfrom solution import f\n@pytest.mark.parametrize('x, y', [(1, 2), pytest.param(2, 3)])\n"
    "@pytest.mark.parametrize('z', [1, 2])\ndef test_f(x, y, z): assert f(x) == y\n",
    "raises": "import pytest\nfrom solution import f\ndef test_f():\n    with pytest.raises((TypeError, KeyError), "
    "match='str') as error: f('a')\n    assert f(2) == 3\n    assert error.type is TypeError and 'str' in str(error.value)\n",
    "approx": "import pytest\nfrom solution import *\ndef test_f():\n    assert f(0.1 + 0.2) == pytest.approx(1.3)\n"
    "    assert [f(1), 2.0000001] == pytest.approx([2, 2])\n    assert {'a': f(1)} == pytest.approx({'a': 2.1}, abs=0.2)\n"
    "    assert f(1) != pytest.approx(2.1)\n",
    "fixtures": "import pytest\nfrom solution import f\nlog = []\n@pytest.fixture\ndef two():\n    yield 2\n    log.append(1)\n"
    "@pytest.fixture(params=[1, 2])\ndef number(request, two): return request.param + two\n"
    "def test_f(two, number): assert f(two) == 3 and number in (3, 4)\ndef test_log(): assert log == [1, 1]\n",
    "built-in fixtures": "from solution import f\nimport os\ndef test_f(tmp_path, capsys, monkeypatch):\n"
    "    (tmp_path / 'a').write_text('1')\n    print('hello')\n    assert capsys.readouterr().out == 'hello\\n'\n"
    "    monkeypatch.setenv('A', 'b')\n    assert os.environ['A'] == 'b' and f(1) == 2\n",
    "class": "from solution import f\nclass TestF:\n    def setup_method(self): self.x = 2\n"
    "    def test_f(self): assert f(self.x) == 3\n",
    "unittest": "import unittest\nfrom solution import f\nclass Case(unittest.TestCase):\n"
    "    def test_f(self): self.assertEqual(f(2), 3)\n",
    "marks": "import pytest\nfrom solution import f\n@pytest.mark.slow\ndef test_f(): assert f(2) == 3\n"
    "@pytest.mark.skip(reason='x')\ndef test_g(): assert False\n",
}


@pytest.mark.parametrize("tests", PASSING.values(), ids=PASSING)
def test_tests_in_pytests_style_run_without_pytest(tests, executor):
    good = run(executor, RIGHT, tests)
    assert good.passed, good
    assert not run(executor, "def f(x):\n    return x + 2\n", tests).passed


def test_pytest_itself_agrees_about_these_tests(tmp_path):
    files = {f"test_{number}.py": tests for number, tests in enumerate(PASSING.values())}
    for name, tests in files.items():
        (tmp_path / name).write_text(tests)
    options = ["-q", "-rf", "--noconftest", "-c", os.devnull, "-p", "no:cacheprovider"]
    for solution, failing in ((RIGHT, set()), ("def f(x):\n    return x + 2\n", set(files))):
        (tmp_path / "solution.py").write_text(solution)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""},
        )
        assert set(re.findall(r"^FAILED .*?(test_\d+\.py)", done.stdout, re.MULTILINE)) == failing
        assert done.returncode == bool(failing), done.stdout


def test_every_test_counts_and_each_is_reported(executor):
    tests = "from solution import f\ndef test_a(): assert f(1) == 2\ndef test_b(): assert f(1) == 3\n"
    result = run(executor, RIGHT, tests)
    assert result.outcomes["test_a[0]"] == "passed"
    assert result.outcomes["test_b[0]"] == "failed"
    assert "AssertionError" in result.details["test_b[0]"]
    assert not result.passed
    assert result.share_passed == 0.5


ESCAPES = {
    "exits early": "import os\nos._exit(0)",
    "exits early by sys": "import sys\nsys.exit(0)",
    "exits in the test": "import os\ndef f(x): os._exit(0)",
    "exits in the test by sys": "import sys\ndef f(x): sys.exit(0)",
    "skips the test": "import unittest\ndef f(x): raise unittest.SkipTest",
    "reports itself": "import os, json\nfor fd in range(3, 50):\n    try: os.write(fd, json.dumps({'nonce': '', "
    "'outcomes': {'test_f[0]': 'passed'}, 'error': None}).encode() + b'\\n')\n    except OSError: pass\nos._exit(0)",
    "patches unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + RIGHT,
    "says passed in its traceback": "import traceback\ntraceback.format_exc = lambda *a, **k: 'passed'\ndef f(x): return 0",
    "formats as passed": "import traceback\ntraceback.format_exception = traceback.format_exc = lambda *a, **k: ['passed']\n"
    "def f(x): return 0",
    "wraps compile": "import builtins\ncompiled = builtins.compile\nbuiltins.compile = lambda text, *a, **k: "
    "compiled(str(text).replace('== 3', '!= 3') if 'test_f' in str(text) else text, *a, **k)\ndef f(x): return 0",
    "wraps exec": "import builtins\nrun = builtins.exec\nbuiltins.exec = lambda code, *a: "
    "run('def test_f(): pass', *a)\ndef f(x): return 0",
    "encodes its own report": "import json\nencode = json.JSONEncoder.encode\njson.JSONEncoder.encode = lambda self, value: "
    "encode(self, {**value, 'outcomes': {'test_f[0]': 'passed'}, 'error': None})\ndef f(x): return 0",
    "dumps its own report": "import json\nold = json.dumps\njson.dumps = lambda v, **k: "
    "old({**v, 'outcomes': {'a': 'passed'}, 'error': None})\ndef f(x): return 0",
    "replaces the harness's functions": "import __main__\nfor name in list(vars(__main__)):\n    if name.startswith('_run') "
    "or name.startswith('run'): setattr(__main__, name, lambda *a, **k: {'test_f[0]': 'passed'})\ndef f(x): return 0",
    "finds no functions": "import inspect\ninspect.isfunction = lambda v: False\ndef f(x): return 0",
    "finds no parameters": "import inspect\ninspect.signature = lambda f: 1 / 0\ndef f(x): return 0",
    "swallows what a test raises": "import contextlib\ncontextlib.ExitStack.__exit__ = lambda *a: True\ndef f(x): return 0",
    "swallows by close": "import contextlib\ncontextlib.ExitStack.close = lambda *a: None\n"
    "contextlib.suppress.__exit__ = lambda *a: True\ndef f(x): return 0",
    "is equal to everything": "class L:\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return L()",
    "is an equal number": "class L(int):\n    def __eq__(self, other): return True\ndef f(x): return L(7)",
    "compares by another slot": "class L:\n    __eq__ = object.__ne__\n    __hash__ = None\ndef f(x): return L()",
    "compares by a C function": "import operator\nclass L:\n    __eq__ = operator.truth\ndef f(x): return L()",
    "is any": "from unittest import mock\ndef f(x): return mock.ANY",
    "is a proxy": "import weakref\nclass L:\n    def __eq__(self, other): return True\nl = L()\ndef f(x): return weakref.proxy(l)",
    "is close to everything": "import pytest\ndef f(x): return pytest.approx(0, abs=float('inf'))",
    "replaces unittest's code": "import unittest\ndef g(self, *a): pass\nunittest.TestCase.assertEqual.__code__ = g.__code__\n"
    + RIGHT,
    "runs no test": "import unittest.case\nunittest.case._Outcome.testPartExecutor = None\n" + RIGHT,
    "lists no test": "import sys, types\nm = types.ModuleType('test_solution')\nvars = lambda *a: {}\n"
    "import builtins\nbuiltins.vars = vars\nbuiltins.isinstance = lambda *a: False\nbuiltins.dict = lambda *a: {}\ndef f(x): return 0",
    "reads the nonce in a fork": "import gc, os, sys, time\nif os.fork() == 0:\n    frame, found = sys._getframe(), []\n"
    "    while frame:\n        found += [v for v in frame.f_locals.values() if isinstance(v, str) and len(v) == 32]\n"
    "        found += [v['nonce'] for v in frame.f_locals.values() if isinstance(v, dict) and 'nonce' in v]\n        frame = frame.f_back\n"
    "    found += [o['nonce'] for o in gc.get_objects() if isinstance(o, dict) and 'nonce' in o]\n"
    '    for nonce in found or [\'\']:\n        line = \'{"nonce": "%s", "outcomes": {"test_f[0]": "passed"}, "details": {}, "error": null}\' % nonce\n'
    "        for fd in range(3, 64):\n            for start in ('', nonce):\n                try: os.write(fd, (start + line).encode() + b'\\n')\n                except OSError: pass\n"
    "    os._exit(0)\nos.wait()\nos._exit(0)",
    "replaces pytest": "import sys, types\nsys.modules['pytest'] = types.ModuleType('pytest')\n" + RIGHT,
    "sleeps for ever": "import time\ntime.sleep(10**6)",
    "computes for ever": "while True: pass",
    "prints without end": "while True: print('x' * 1024)",
    "prints 1 GB and is right": "for _ in range(1 << 20): print('x' * 1024)\n" + RIGHT,
    "takes 8 GB": "x = bytearray(8 << 30)\n" + RIGHT,
    "writes a big file": "open('big', 'wb').write(b'x' * (100 << 20))\n" + RIGHT,
    "deletes its folder": "import os, shutil\nshutil.rmtree(os.getcwd())\n" + RIGHT,
    "is no Python": "def f(x) return x",
    "crashes": "import ctypes\nctypes.string_at(0)",
}


@pytest.mark.parametrize("solution", ESCAPES.values(), ids=ESCAPES)
def test_a_solution_that_does_not_pass_the_tests_gets_nothing(solution, executor, request):
    if "for ever" in request.node.callspec.id:
        executor.limits = dataclasses.replace(LIMITS, cpu_s=1, wall_s=2.0)
    before, folders = set(processes()), set(os.listdir(tempfile.gettempdir()))
    start = time.monotonic()
    result = run(executor, solution)
    assert not result.passed
    assert time.monotonic() - start < LIMITS.wall_s + 5
    assert not [line for pid, line in processes().items() if pid not in before and "harness" in line]
    assert not [
        n for n in os.listdir(tempfile.gettempdir()) if n not in folders and n.startswith("memgen-limits-")
    ]


UNITTEST = (
    "import unittest\nclass TestF(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(2), 3)\n"
    "    def test_b(self): self.assertTrue(f(1) == 2)\n"
)
SHARED = "import unittest\nclass TestCase(unittest.TestCase):\n    def test_a(self): pass\n"
FORGERIES = {
    "patches unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + RIGHT,
    "patches its outcome": "import unittest.case, contextlib\n@contextlib.contextmanager\ndef skip(*a, **k):\n    try: yield\n"
    "    except BaseException: pass\nunittest.case._Outcome.testPartExecutor = skip\n" + RIGHT,
    "patches it late": "import unittest\ndef f(x):\n    unittest.TestCase.assertTrue = lambda *a: None\n    return x + 1",
    "replaces unittest": "import sys, types, unittest\nm = types.ModuleType('unittest')\nclass T: pass\nm.TestCase = T\n"
    f"sys.modules['unittest'] = m\n{SHARED}\n{RIGHT}",
    "patches the loader": f"import unittest\nunittest.TestLoader.getTestCaseNames = lambda *a: []\n{SHARED}\ndef f(x): return 0",
    "is equal to everything": "class L:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\ndef f(x): return L()",
    "holds what is equal": "class L(int):\n    def __eq__(self, other): return True\ndef f(x): return L(9)",
    "formats as passed": "import traceback\ntraceback.format_exception = lambda *a, **k: 'passed'\ndef f(x): return 0",
    "names its test": "import unittest\nunittest.TestCase.__str__ = lambda self: 'x'\ndef f(x): return 0",
    "replaces main": "import sys\nsys.modules['__main__'].f = lambda x: x + 1\ndef f(x): return 0",
}


@pytest.mark.parametrize("solution", FORGERIES.values(), ids=FORGERIES)
def test_a_solution_cannot_change_how_unittest_judges_it(solution, executor):
    assert run(executor, RIGHT, UNITTEST, "unittest").passed
    assert not run(executor, solution, UNITTEST, "unittest").passed


NESTED = (
    "from solution import f\ndef test_f():\n    assert f(1) == [1, {'a': (2, 3)}]\n    assert {1, 2} == f(2)\n"
    "    assert f(3) in [4, 5]\n    assert f(3) != 5\n"
)
GOOD = "def f(x): return {1: [1, {'a': (2, 3)}], 2: {1, 2}, 3: 4}[x]\n"
LIAR = "class L:\n    def __eq__(self, o): return True\n    def __hash__(self): return 1\n"


def test_objects_that_are_equal_to_everything_are_found_wherever_they_are(executor):
    assert run(executor, GOOD, NESTED).passed
    for answer in ("[L(), {'a': (2, 3)}]", "[1, {'a': (2, L())}]", "[1, {'a': L()}]", "[1, {L(): (2, 3)}]"):
        assert not run(executor, LIAR + GOOD.replace("[1, {'a': (2, 3)}]", answer), NESTED).passed, answer
    assert not run(executor, LIAR + GOOD.replace("3: 4}", "3: L()}"), NESTED).passed


def test_objects_that_compare_honestly_are_compared_as_ever(executor):
    solution = (
        "import collections, dataclasses, decimal, enum, fractions\nPoint = collections.namedtuple('Point', 'x y')\n"
        "class Colour(enum.IntEnum):\n    RED = 1\nclass Name(str): pass\n@dataclasses.dataclass\nclass D:\n    x: int\n"
        "class Bag(dict): pass\nclass V:\n    def __init__(self, n): self.n = n\n    def __eq__(self, o): return self.n == o.n\n"
    )
    tests = (
        "from solution import *\nimport collections, decimal, fractions, datetime\ndef test_them():\n    assert Point(1, 2) == (1, 2)\n"
        "    assert Colour.RED == 1\n    assert Name('a') == 'a'\n    assert D(1) == D(1) and D(1) != D(2)\n    assert Bag(a=1) == {'a': 1}\n"
        "    assert V(1) == V(1) and V(1) != V(2)\n    assert decimal.Decimal(3) == 3 and fractions.Fraction(6, 2) == 3\n"
        "    assert collections.Counter('aab') == {'a': 2, 'b': 1}\n    assert [D(1), V(2)] == [D(1), V(2)]\n"
        "    assert collections.deque([1]) == collections.deque([1])\n    assert 1 < 2 <= 2 and 'a' in {'a': 1}\n"
        "    assert {'a': [1, (2, {3})]} == {'a': [1, (2, {3})]}\n    x = []; x.append(x)\n    assert x in [x]\n"
    )
    result = run(executor, solution, tests)
    assert result.passed, result


def test_a_test_without_an_import_finds_the_solution_as_in_kodcodes_own_harness(executor):
    tests = "def test_f():\n    assert f(2) == 3\n    with pytest.raises(TypeError): f('a')\n"
    assert run(executor, RIGHT, tests).passed
    assert not run(executor, "def f(x): return 0", tests).passed
    assert not run(executor, "def g(x): return 0", tests).passed


def test_processes_that_take_too_much_memory_together_are_stopped():
    executor = LimitedProcess(dataclasses.replace(LIMITS, total_memory_mb=200, memory_mb=512), 1)
    greedy = "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        x = b'x' * (100 << 20)\n        time.sleep(9)\ntime.sleep(9)\n"
    result = run(executor, greedy + RIGHT)
    assert result.error == "stopped for its memory"
    assert result.seconds < 5


SHUT_IN = {
    "forks without end": "import os\nwhile True: os.fork()",
    "forks, quietly": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "opens a socket": f"import socket\nsocket.create_connection(('127.0.0.1', {{port}}), 2)\n{RIGHT}",
    "sends a datagram": f"import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('9.9.9.9', 9))\n{RIGHT}",
    "reads the task again": "import os\nfor pid in (1, os.getppid()):\n    fd = os.open(f'/proc/{pid}/fd/0', os.O_RDONLY | os.O_NONBLOCK)\n"
    f"    assert os.read(fd, 10)\n{RIGHT}",
    "reads the first process's memory": f"import os\nopen(f'/proc/{{os.getppid()}}/mem', 'rb')\n{RIGHT}",
    "reads a file of the host": f"open('/etc/passwd')\n{RIGHT}",
    "reads this test": f"open({__file__!r})\n{RIGHT}",
    "lists homes": f"import os\nos.listdir('/home')\n{RIGHT}",
    "writes into the interpreter": f"import json\nopen(json.__file__, 'a')\n{RIGHT}",
    "imports an installed package": f"import numpy\n{RIGHT}",
    "kills all": f"import os, signal\nos.kill(-1, signal.SIGKILL)\n{RIGHT}",
    "becomes root": f"import os\nos.setuid(0)\nopen('/root/x', 'w')\n{RIGHT}",
    "mounts": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0\n"
    + RIGHT,
}


@pytest.mark.sandbox
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
class TestSandbox:
    @pytest.mark.parametrize("solution", SHUT_IN.values(), ids=SHUT_IN)
    def test_what_would_reach_the_host_fails_and_leaves_no_process(self, solution, bubblewrap):
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.1)
            before = set(processes())
            result = run(bubblewrap, solution.replace("{port}", str(server.getsockname()[1])))
            assert not result.passed
            with pytest.raises(TimeoutError):
                server.accept()
        left = [line for pid, line in processes().items() if pid not in before]
        assert not [line for line in left if "bwrap" in line or "harness.py" in line or "/program.py" in line]

    def test_children_that_detach_themselves_die_with_the_run(self, bubblewrap):
        token = f"{time.monotonic_ns()}"
        child = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execv('/python/bin/python3', ['python3', '-c', 'import time; time.sleep(999)', '{token}'])\n    os._exit(0)\nos.wait()\ntime.sleep(0.3)\n"
        assert run(bubblewrap, child + RIGHT).passed, "it is not forbidden to start a process"
        assert not [line for line in processes().values() if token in line]
        assert not run(bubblewrap, child + "time.sleep(999)").passed
        assert not [line for line in processes().values() if token in line]

    def test_nothing_but_the_interpreter_is_there(self, bubblewrap):
        tests = (
            "import os\ndef test_files():\n    assert sorted(os.listdir('/')) == EXPECTED\n"
            "    assert sorted(os.listdir('/etc')) == ['hosts', 'nsswitch.conf']\n    assert os.listdir('/bin') == []\n"
            "    assert sorted(os.environ) == sorted(set(os.environ) & KNOWN)\n    assert os.getuid() != 0\n"
            "    assert len([n for n in os.listdir('/proc') if n.isdigit()]) <= 3\n"
            "    assert [l.split(':')[0].strip() for l in open('/proc/net/dev').readlines()[2:]] == ['lo']\n"
        )
        top = {"bin", "dev", "etc", "lib", "lib64", "packages", "proc", "program.py", "python", "tmp", "usr"}
        known = {
            "HOME TMPDIR PATH LANG LC_ALL LC_CTYPE TZ PYTHONHASHSEED PYTHONDONTWRITEBYTECODE PYTHONIOENCODING PYTHONHOME PWD "
            "OPENBLAS_NUM_THREADS OMP_NUM_THREADS MKL_NUM_THREADS MPLBACKEND LD_LIBRARY_PATH"
        }
        names = (
            f"EXPECTED = sorted({sorted(top)} if os.path.exists('/lib64') else {sorted(top - {'lib64'})})\n"
        )
        names += f"KNOWN = set({sorted(known)[0].split()})\n"
        result = run(bubblewrap, "", tests.replace("import os\n", "import os\n" + names, 1))
        assert result.passed, result

    def test_the_trainers_secrets_are_not_in_its_processes(self, bubblewrap, monkeypatch):
        monkeypatch.setenv("MEMGEN_TEST_SECRET", "geheim")
        tests = (
            "import glob\ndef test_secret():\n    for name in glob.glob('/proc/[0-9]*/environ'):\n        try: text = open(name).read()\n"
            "        except OSError: continue\n        assert 'geheim' not in text\n"
        )
        assert run(bubblewrap, "", tests).passed

    def test_named_packages_and_programs_are_there_and_read_only(self):
        executor = Bubblewrap(LIMITS, packages=["numpy", "dateutil"], programs=["sh", "echo"])
        tests = (
            "import numpy, dateutil, subprocess, pytest\ndef test_them():\n    assert (numpy.ones(3) + 1).sum() == 6\n"
            "    assert subprocess.run('echo a', shell=True, capture_output=True).stdout == b'a\\n'\n"
            "    with pytest.raises(OSError): open(numpy.__file__, 'a')\n    with pytest.raises(ImportError): import torch\n"
        )
        result = run(executor, "", tests)
        assert result.passed, result
        with pytest.raises(ValueError, match="no installed package nonsuch"):
            Bubblewrap(packages=["nonsuch"])
        with pytest.raises(ValueError, match="no command nonsuch"):
            Bubblewrap(programs=["nonsuch"])

    def test_one_and_eight_workers_give_the_same_scores(self):
        programs = [
            Program(RIGHT if i % 3 else list(ESCAPES.values())[i // 3 % 8], TEST, "pytest") if i % 5 else None
            for i in range(40)
        ]
        rewards = [score(Bubblewrap(LIMITS, workers=n), programs) for n in (1, 8)]
        assert rewards[0] == rewards[1]
        assert [r.total for r in rewards[0]] == [float(i % 3 > 0 and i % 5 > 0) for i in range(40)]

    def test_any_thread_may_run_programs(self, bubblewrap):
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(run(bubblewrap, RIGHT).passed)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 4

    def test_a_program_that_is_killed_takes_its_sandboxes_along(self, tmp_path):
        token = f"{time.monotonic_ns()}"
        script = tmp_path / "score.py"
        script.write_text(
            "from memgen.environments.code.sandbox import *\n"
            f"Bubblewrap(RunLimits(wall_s=99)).run(Program('import time\\nprint({token})\\ntime.sleep(99)', '', 'pytest'))\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen([sys.executable, str(script)], env=environment)
        deadline = time.monotonic() + 60
        while not (found := sandboxed(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
        while found & set(processes()):
            assert time.monotonic() < deadline, "the sandbox outlived its program"
            time.sleep(0.05)

    def test_a_sandbox_that_cannot_start_is_an_error_and_not_a_wrong_answer(self, tmp_path, monkeypatch):
        fake = tmp_path / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: no namespaces here' >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(
            RuntimeError, match=r"cannot be used here .*no namespaces here.*isolation: limits"
        ):
            run(Bubblewrap(LIMITS), RIGHT)

    def test_kodcode_rewards_come_from_the_sandbox(self, tmp_path):
        row = {
            "question": "Add one.",
            "solution": RIGHT,
            "test": TEST,
            "test_info": [
                {"function_name": "f", "function_declaration": "def f(x):", "parameter_list": "(x)"}
            ],
        }
        (tmp_path / "k.json").write_text(json.dumps([row]))
        environment = KodCode(str(tmp_path), test_fraction=1.0, validation_fraction=0.0)
        (example,) = environment.examples("test")
        answers = [
            example.target,
            f"So:\n```python\n{RIGHT}```\nFor example:\n```python\nprint(f(1))\n```",
            "def add(x):\n    return x + 1 if x > 0 else add(-x)",
            "def f(x): return x",
            "I do not know.",
            "",
        ]
        rewards = environment.rewards([example] * len(answers), answers)
        assert [r.total for r in rewards] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        assert [r.parts["has_answer"] for r in rewards] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
        assert rewards[0] == environment.reward(example, answers[0])

    @pytest.mark.timeout(2400)
    @pytest.mark.skipif(
        not DATA.is_dir(), reason=f"the real BigCodeBench data is not in {DATA} (set MEMGEN_SHARED)"
    )
    def test_real_gold_solutions_that_pass_in_a_bare_interpreter_pass_in_the_sandbox(self, tmp_path):
        environment = BigCodeBench(str(DATA), test_fraction=1.0, reward_workers=3)
        examples = environment.examples("test")
        assert len(examples) == 300
        examples = examples[::3]
        gold = [r.total for r in environment.rewards(examples, [e.target for e in examples])]
        empty = [f"```python\n{e.meta['code_prompt']}    return None\n```" for e in examples]
        assert sum(r.total for r in environment.rewards(examples, empty)) <= 1
        with gzip.open(DATA / "BigCodeBench.jsonl.gz") as file:
            rows = {row["task_id"]: row for row in map(json.loads, file)}
        with ThreadPoolExecutor(3) as pool:
            bare = list(pool.map(lambda e: passes_bare(rows[e.meta["task_id"]], tmp_path), examples))
        both = sum(b and g > 0 for b, g in zip(bare, gold, strict=True))
        assert both >= 0.95 * sum(bare)
        assert sum(bare) > 0.76 * len(examples)


def passes_bare(row, folder):
    here = folder / row["task_id"].replace("/", "-")
    here.mkdir()
    text = row["complete_prompt"] + row["canonical_solution"] + "\n" + row["test"] + "\nunittest.main()\n"
    (here / "task.py").write_text(text)
    try:
        done = subprocess.run(
            [base_python(), "-s", "-S", "task.py"],
            cwd=here,
            capture_output=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and b"Ran 0 tests" not in done.stderr


# Not SIGUSR1: a trainer in this process blocks it for every process it starts.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("times", [1, 2])
def test_a_schedulers_warning_that_ends_a_run_says_nothing_about_the_answer_the_first_time(
    executor, number, times
):
    assert run(executor, RIGHT).passed, "the executor's probe before its first run is over"
    name = f"answer-{os.getpid()}"  # What the process calls itself once the solution runs.
    slow = f"import ctypes, time\nctypes.CDLL(None).prctl(15, {name.encode()!r})\ntime.sleep(1.5)\n{RIGHT}"
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run, executor, slow)
        struck: set[str] = set()
        deadline = time.monotonic() + 20
        while len(struck) < times and not result.done() and time.monotonic() < deadline:
            for pid in runs_at_their_solution(name) - struck:
                os.kill(int(pid), number)
                struck.add(pid)
            time.sleep(0.02)
        assert len(struck) == times
        assert result.result().passed == (times == 1)


def test_limits_alone_leave_the_hosts_files_readable(executor, tmp_path):
    (tmp_path / "hosts_file").write_text("1")
    result = run(executor, f"open({str(tmp_path / 'hosts_file')!r})\n{RIGHT}")
    assert result.passed == isinstance(executor, LimitedProcess)
