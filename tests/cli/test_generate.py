"""`memgen generate`: what is asked in which form, and a conversation at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import memgen
from memgen.chat import byte_tokens
from memgen.cli.main import main
from memgen.lab.tokenizer import lab_tokenizer
from saved_agent import save_agent, save_base
from tiny import byte_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
SHORT = {"max_new_tokens": 8}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("base"))
    return save_agent(tmp_path_factory.mktemp("agent"), base)


@pytest.fixture(scope="module")
def agent(checkpoint):
    return memgen.load(checkpoint)


@pytest.fixture
def ask(agent, checkpoint, monkeypatch, capsys):
    """Runs the command with the loaded agent; standard output, standard error, exit status."""
    monkeypatch.setattr("memgen.api.agent.Agent.from_pretrained", lambda name, **options: agent)

    def run(*arguments: str, stdin: str = "", tokens: int = 8) -> tuple[str, str, int]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        length = ["--max-new-tokens", str(tokens)]
        status = main(["generate", "--checkpoint", str(checkpoint), "--mark", "", *length, *arguments])
        return (*capsys.readouterr(), status)

    return run


def test_a_system_prompt_and_messages_come_before_the_prompt(agent, ask, tmp_path):
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(EARLIER))
    asked = {
        ("--prompt", "Three?"): "Three?",
        ("--prompt", "Three?", "--system", "Be brief."): [SYSTEM, user("Three?")],
        ("--prompt", "Three?", "--messages", str(file)): [*EARLIER, user("Three?")],
        ("--system", "Be brief.", "--messages", str(file)): [SYSTEM, *EARLIER],
    }
    for arguments, question in asked.items():
        assert ask(*arguments)[0] == agent.generate(question, **SHORT).text + "\n"
    assert ask("--messages", "-", stdin=file.read_text())[0] == ask("--messages", str(file))[0]
    two = [agent.generate([SYSTEM, user(text)], **SHORT).text for text in ("One?", "Two?\n")]
    assert ask("--system", "Be brief.", stdin="One?\nTwo?\\n\n")[0] == "".join(f"{text}\n" for text in two)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--raw", "--system", "a", "--prompt", "b"], "leave out --raw or --system"),
        (["--raw", "--interactive"], "leave out --raw or --interactive"),
        (["--messages", "none.json"], "--messages none.json cannot be read"),
        (["--messages", "-"], "--messages - cannot be read"),
        (["--messages", "text.json"], "must hold a JSON list"),
        (["--messages", "system.json", "--system", "a"], "give one of them"),
        (["--messages", "robot.json"], "a message is a mapping with a role"),
        (["--messages", "-", "--interactive"], "must be a file"),
        ([], "there is no prompt"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_cannot_be_asked_is_one_line(ask, tmp_path, monkeypatch, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text('"text"')
    (tmp_path / "system.json").write_text(json.dumps([SYSTEM, *EARLIER]))
    (tmp_path / "robot.json").write_text('[{"role": "robot", "content": "a"}]')
    out, err, status = ask(*arguments)
    assert (out, status) == ("", 2)
    assert complaint in err
    assert err.count("\n") == 1


def test_characters_that_the_tokenizer_knows_as_bytes_alone_are_named(ask, agent):
    assert byte_tokens(byte_tokenizer(), "plain, text\n") == []
    assert byte_tokens(byte_tokenizer(), "a 你a ï") == ["你", "你", "你", "ï", "ï"]
    assert byte_tokens(lab_tokenizer(), "shop : fig .\n") == []
    assert byte_tokens(byte_tokenizer(), "\ufffd") == []
    out, err, _ = ask("--prompt", "a 你a ï")
    assert out == agent.generate("a 你a ï", **SHORT).text + "\n"
    assert (
        "[5 of 9 tokens of this text are bytes of characters that the tokenizer does not know: '你', 'ï'"
        in err
    )
    assert "bytes" not in ask("--prompt", "plain")[1]


def test_a_conversation_is_answered_turn_by_turn_from_the_texts_before(agent, ask):
    first = agent.generate([SYSTEM, user("One?")], **SHORT).text
    said = [SYSTEM, user("One?"), {"role": "assistant", "content": first}]
    second = agent.generate([*said, user("Two?\n")], **SHORT).text
    assert first.strip()
    lines = "Two?\\n\n\nOne?\n"
    out, err, status = ask("--interactive", "--system", "Be brief.", "--prompt", "One?", stdin=lines)
    assert status == 0
    assert out == f"{first}\n{second}\n{first}\n\n"
    assert err.count(" tokens, ") == 3
    assert "[a new conversation]" in err


def test_what_cannot_be_answered_leaves_a_conversation_as_it_was(agent, ask):
    answer = agent.generate("One?", **SHORT).text
    out, err, status = ask("--interactive", stdin=f"{'a' * 600}\nOne?\n")
    assert (out, status) == (f"{answer}\n\n", 0)
    assert "[not answered: " in err
    assert "the reasoner's context is 512" in err


def test_an_answer_without_text_is_not_kept(agent, ask, monkeypatch):
    asked, answer = [], agent.generate("One?", **SHORT)

    def blank(self, question, **options):
        asked.append(question)
        yield "\n"
        return answer

    monkeypatch.setattr(type(agent), "stream", blank)
    err = ask("--interactive", stdin="One?\nTwo?\n")[1]
    assert asked == [[user("One?")], [user("Two?")]]
    assert err.count("the conversation goes on without this turn") == 2


class Terminal:
    """A command with a pseudo-terminal as its controlling one, so that Ctrl-C is a signal."""

    def __init__(self, *command: str) -> None:
        self.master, self.slave = pty.openpty()
        # The first terminal that a session's leader opens becomes its own.
        opened = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&1', os.ttyname(self.slave), *command]
        self.process = subprocess.Popen(opened, start_new_session=True, env={**os.environ, "TERM": "dumb"})
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str, seconds: float = 120) -> str:
        """What is shown up to a pattern."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.shown)) is None:
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come; shown: {self.shown!r}"
            if select.select([self.master], [], [], left)[0]:
                with suppress(OSError):  # EIO: all have closed it.
                    self.shown += os.read(self.master, 4096).decode(errors="replace")
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(checkpoint):
    command = [sys.executable, "-m", "memgen.cli.main", "generate", "--checkpoint", str(checkpoint)]
    opened = Terminal(*command, "--max-new-tokens", "400", "--mark", "")
    yield opened
    opened.close()


def test_at_a_terminal_ctrl_c_ends_an_answer_or_a_line_and_ctrl_d_the_session(terminal):
    assert "Loading" not in terminal.until("> ")
    terminal.type("One?\n")
    terminal.until(r"One\?\r\n[^\r\n]")
    terminal.type("\x03")
    terminal.until(r"\[interrupted\]\r\n> ")
    terminal.type("half a li\x03")
    terminal.until("> ")
    terminal.type("\n")
    terminal.until(r"\[a new conversation\]")  # What was written so far was kept.
    terminal.type("\x04")
    terminal.process.wait(60)
    assert terminal.process.returncode == 0
