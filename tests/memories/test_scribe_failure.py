"""What a memory does where its scribe is gone or answers nonsense."""

from __future__ import annotations

import logging

import pytest

from experiences import ScriptedScribe, experience
from memgen.memories.a_mem import AMem
from memgen.memories.scribe import ScribeError


@pytest.mark.parametrize("answer", [None, "I would rather not."], ids=["gone", "nonsense"])
def test_a_scribe_that_fails_is_replaced_by_the_fallback_under_its_own_name(tmp_path, answer, caplog):
    scribe = ScriptedScribe(lambda prompt: answer)
    with AMem(tmp_path / "memory.sqlite", scribe=scribe) as memory, caplog.at_level(logging.WARNING):
        report = memory.write(experience("buy figs"))
        assert (memory.name, report.method, report.fallbacks, report.added) == ("a_mem", "a_mem/df", 1, 1)
        assert report.usage.failures == (answer is None)
        assert "the deterministic fallback answers" in caplog.text
        assert len(memory.read("figs")) == 1
        assert memory.fallbacks == 2, "a read is answered without the scribe, too"
    with AMem(tmp_path / "without.sqlite") as memory:
        assert memory.write(experience("buy figs")).method == memory.name == "a_mem/df"


@pytest.mark.parametrize("answer", [None, "I would rather not."], ids=["gone", "nonsense"])
def test_a_scribe_that_fails_stops_the_memory_if_it_is_to(tmp_path, answer):
    scribe = ScriptedScribe(lambda prompt: answer)
    with AMem(tmp_path / "memory.sqlite", scribe=scribe, on_scribe_failure="stop") as memory:
        with pytest.raises(ScribeError, match=r"scribe script.*asked for a note.*on_scribe_failure"):
            memory.write(experience("buy figs"))
        assert memory.store.items("note") == []
        assert memory.store.tick == 0, "a write that stops leaves nothing"
    with pytest.raises(ValueError, match="on_scribe_failure must be fallback or stop, got 'never'"):
        AMem(tmp_path / "memory.sqlite", on_scribe_failure="never")
