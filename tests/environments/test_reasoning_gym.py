"""Reasoning Gym's tasks as an environment: which are refused, what is in a split, and how answers are scored."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from memgen.cli import main as front_end
from memgen.cli.gold import failing_references
from memgen.environments.qa import reasoning_gym as module
from memgen.environments.qa.reasoning_gym import REFUSED, TAGS_SYSTEM, GymTask, ReasoningGym
from memgen.environments.questions import normalised
from memgen.lab.saving import save_backbone
from tiny import byte_tokenizer, tiny_causal_lm

ROOT = Path(__file__).resolve().parents[2]
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""100 different questions with each operator."""
EASY = {"knight_swap": {"max_nodes": 6, "max_attempts": 2}}
"""Parameters of tasks that take seconds an item without them."""
NO_REFERENCE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
ISOLATIONS = ["limits", "bubblewrap"] if shutil.which("bwrap") else ["limits"]

with_library = [
    pytest.mark.reasoning_gym,
    pytest.mark.skipif(
        importlib.util.find_spec("reasoning_gym") is None, reason="the extra reasoning-gym is absent"
    ),
]


def marked(test):
    for mark in with_library:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMGEN_HOME", str(tmp_path / "home"))


@pytest.fixture
def make():
    """Makes environments, and ends their workers."""
    made = []

    def make(*tasks, **settings):
        settings = {"isolation": "limits", "reward_workers": 1, "train_size": 12, **settings}
        made.append(ReasoningGym(tasks=tasks, **settings))
        return made[-1]

    yield make
    for environment in made:
        environment.close()


@pytest.mark.parametrize("task", REFUSED)
def test_a_task_whose_scorer_can_be_fooled_is_refused_with_the_reason(task):
    with pytest.raises(ValueError, match=f"^{task} is refused: .*{REFUSED[task][-20:]}"):
        ReasoningGym(tasks=["chain_sum", task])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tasks": []}, "tasks must name at least one"),
        ({"answer_style": "boxed"}, "answer_style must be plain or tags, got 'boxed'"),
        ({"prompt": "Answer."}, "prompt must contain"),
        ({"seed": -1}, "seed must be from 0 to 400, got -1"),
        ({"val_size": 0}, "val_size must be at least 1, got 0"),
        ({"min_score": 0.0}, "min_score must be above 0"),
        ({"timeout_s": float("inf")}, "timeout_s must be a positive number"),
        ({"memory_mb": 0}, "memory_mb must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        ReasoningGym(**settings)


def test_a_share_below_one_is_refused():
    with pytest.raises(ValueError, match="share of gcd must be at least 1, got 0"):
        GymTask("gcd", share=0)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"memgen\[reasoning-gym\]"):
        ReasoningGym()


@marked
def test_only_tasks_that_read_answers_as_code_need_bubblewrap(make, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^countdown: bubblewrap .* is not installed"):
        make("chain_sum", "countdown", isolation="bubblewrap")
    assert make("chain_sum", isolation="bubblewrap").examples("val")


@marked
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("chain_sums", "'chain_sums' is not a task of Reasoning Gym; did you mean chain_sum?"),
        (GymTask("chain_sum", {"min_term": 2}), "chain_sum has no parameter 'min_term'; did you mean min_terms?"),
        (GymTask("chain_sum", {"seed": 2}), "chain_sum: seed is no parameter, but a setting of the environment"),
        (
            GymTask("chain_sum", {"min_terms": 5, "max_terms": 2}),
            'chain_sum does not take the parameters {"min_terms": 5, "max_terms": 2}: max_terms must be >= min_terms',
        ),
        (GymTask("chain_sum", {"min_terms": "two"}), "chain_sum does not take the parameters"),
    ],
)  # fmt: skip
def test_what_the_library_does_not_take_is_refused_in_one_line(make, task, message):
    with pytest.raises(ValueError, match=r"^") as refused:
        make(task)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def questions(environment, split):
    return [example.question for example in environment.examples(split)]


@marked
@pytest.mark.parametrize("task", ["coin_flip", "gcd", "letter_counting", "list_functions"])
def test_splits_share_no_question_whatever_the_seed_and_the_sizes(make, task):
    sizes = {"train_size": 60, "val_size": 12, "test_size": 20}
    environment = make(task, **sizes)
    splits = {split: questions(environment, split) for split in ("train", "val", "test")}
    assert [len(items) for items in splits.values()] == list(sizes.values())
    seen = [normalised(question) for items in splits.values() for question in items]
    assert len(set(seen)) == len(seen)
    # Another process, in which a longer split is the first to be read.
    longer = make(task, train_size=90, val_size=12, test_size=30)
    assert questions(longer, "test")[:20] == splits["test"]
    train = longer.examples("train")
    assert [example.question for example in train[:60]] == splits["train"]
    assert train[:60] == environment.examples("train")
    other = make(task, seed=1, **sizes)
    later = questions(other, "train")
    assert later != splits["train"]
    assert not {normalised(q) for q in later} & {normalised(q) for q in splits["val"] + splits["test"]}


@marked
def test_a_task_with_too_few_questions_says_how_many_it_has(make):
    environment = make(GymTask("chain_sum", {**SUMS, "allow_negation": False}), train_size=500)
    with pytest.raises(ValueError, match=r"chain_sum has \d+ different train questions in [\d,]+ draws, and "
                                         r"train_size 500 asks for 500; set train_size lower"):  # fmt: skip
        environment.examples("train")


@marked
def test_tasks_take_turns_by_their_shares(make):
    environment = make("gcd", GymTask("leg_counting", share=2), train_size=7)
    examples = environment.examples("train")
    assert [example.meta["task"] for example in examples] == [
        "gcd", "leg_counting", "leg_counting", "gcd", "leg_counting", "leg_counting", "gcd",
    ]  # fmt: skip
    assert [example.id for example in examples] == [f"train-{index}" for index in range(7)]
    rewards = environment.rewards(examples[:2], [examples[0].target, "no idea"])
    assert [reward.total for reward in rewards] == [1.0, 0.0]
    assert rewards[0].parts["gcd/exact"] == 1.0
    assert rewards[1].parts["leg_counting/exact"] == 0.0
    # The same questions twice are no more questions.
    twice = make("gcd", "gcd", train_size=8)
    assert questions(twice, "train") == [
        example.question for example in make("gcd", train_size=8).examples("train")
    ]


@marked
def test_an_answer_is_the_whole_completion_or_what_the_last_tags_hold(make):
    plain = make("spell_backward")
    example = plain.examples("train")[0]
    assert plain.messages(example) == [
        {"role": "user", "content": f"{example.question}\nReply with the final answer only."}
    ]
    assert plain.conversation(example)[-1] == {"role": "assistant", "content": example.answer}
    assert plain.reward(example, f" {example.answer}\n").total == 1.0
    assert plain.reward(example, f"It is {example.answer}").total == 0.0
    empty = plain.reward(example, " ")
    assert (empty.total, empty.parts["has_answer"]) == (0.0, 0.0)

    tags = make("spell_backward", answer_style="tags", prompt="Q: {question}")
    example = tags.examples("train")[0]
    assert tags.messages(example) == [
        {"role": "system", "content": TAGS_SYSTEM},
        {"role": "user", "content": f"Q: {example.question}"},
    ]
    assert example.target == f"<answer>{example.answer}</answer>"
    right = f"<answer>{example.answer}</answer>"
    for completion, total in [
        (f"Thus <answer>x</answer>, no: {right}.", 1.0),
        (f"{right} or <answer>x</answer>", 0.0),
        (f"{right} or <answer>", 1.0),
        (example.answer, 0.0),
        ("</answer>", 0.0),
    ]:
        assert tags.reward(example, completion).total == total, completion


@marked
def test_partial_credit_is_a_part_of_the_reward_and_no_reward_unless_asked_for(make):
    strict = make("chain_sum")
    example = strict.examples("train")[0]
    answer = f"{example.answer}, surely"
    reward = strict.reward(example, answer)
    assert reward.total == reward.parts["exact"] == 0.0
    assert 0.0 < reward.parts["score"] < 1.0
    assert make("chain_sum", min_score=0.01).reward(example, answer).total == 1.0


@marked
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_hostile_answer_scores_nothing_and_costs_no_other_answer_anything(make, isolation, tmp_path):
    environment = make(
        "countdown", "spiral_matrix", "polynomial_multiplication", "prime_factorization", "complex_arithmetic",
        "simple_integration", isolation=isolation, timeout_s=1.0, train_size=6,
    )  # fmt: skip
    examples = {example.meta["task"]: example for example in environment.examples("train")}
    integrand = re.search("∫ (.*) dx", examples["simple_integration"].question)[1]
    variable = re.search("[A-Za-z]", integrand)[0]
    touched = tmp_path / "touched"
    write = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    attacks = [
        ("countdown", "9**9**9**9", "timed_out"),
        ("countdown", write, None),
        ("countdown", f"{examples['countdown'].answer} + True - True", None),
        ("spiral_matrix", write, None),
        ("spiral_matrix", "oracle_answer.split()", None),
        ("polynomial_multiplication", write, None),
        ("polynomial_multiplication", "9**9**9**9", "timed_out"),
        ("polynomial_multiplication", "x.__class__", None),
        ("prime_factorization", "a lot", "scorer_failed"),
        ("complex_arithmetic", "nan", None),
        ("simple_integration", f"Integral({integrand}, {variable})", None),
    ]
    before = environment.worker_pids
    rewards = environment.rewards(
        [examples[task] for task, _, _ in attacks], [text for _, text, _ in attacks]
    )
    for (task, text, part), reward in zip(attacks, rewards, strict=True):
        assert reward.total == 0.0, (task, text)
        assert reward.parts["score"] < 0.1, (task, text)
        failed = {name for name in ("timed_out", "scorer_failed") if reward.parts[name]}
        assert failed == ({part} if part else set()), (task, text)
    assert not touched.exists()
    assert environment.worker_pids == before, "the answers' own processes were killed, not the worker"
    right = environment.rewards(list(examples.values()), [example.answer for example in examples.values()])
    assert [reward.total for reward in right] == [1.0] * 6


@marked
@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_worker_that_is_killed_or_warned_makes_no_answer_wrong(make, isolation):
    environment = make("gcd", isolation=isolation)
    example = environment.examples("train")[0]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in environment.worker_pids:
            os.kill(pid, number)
        assert environment.reward(example, example.answer).total == 1.0
    (pid,) = environment.worker_pids
    environment.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@marked
def test_a_task_without_references_is_played_but_not_imitated(make):
    environment = make("rush_hour", "gcd", train_size=2)
    game, sum_ = environment.examples("train")
    assert environment.messages(game)[0]["content"].startswith(game.question)
    assert environment.reward(game, "no idea").total == 0.0
    with pytest.raises(ValueError, match="rush_hour has no reference answers, which weaver SFT"):
        environment.conversation(game)
    assert environment.conversation(sum_)[-1]["content"] == sum_.answer


@marked
def test_items_whose_own_reference_does_not_score_1_are_left_out_and_counted(make, monkeypatch, caplog):
    environment = make("gcd", train_size=3)
    drawn = [
        ["a?", "1", 0.5, ""], "RuntimeError: no maze", *[[f"{i}?", "1", 1.0, ""] for i in range(40)],
    ]  # fmt: skip
    monkeypatch.setattr(environment._pool, "ask", lambda request, timeout_s: drawn)
    assert "a?" not in questions(environment, "train")
    assert "1 items are left out: gcd's own reference answer does not score 1" in caplog.text
    assert "1 items are left out: gcd's generator failed (RuntimeError: no maze)" in caplog.text


@marked
def test_what_took_long_to_draw_is_drawn_once(make, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_WORTH_KEEPING_S", 0.0)
    first = make("gcd").examples("train")
    kept = list((tmp_path / "home" / "reasoning_gym").iterdir())
    assert kept
    again = make("gcd")
    monkeypatch.setattr(again._pool, "ask", None)
    assert again.examples("train") == first


@marked
def test_a_tiny_model_is_fitted_and_the_references_are_right(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    save_backbone(tiny_causal_lm(0, max_position_embeddings=2048), byte_tokenizer(), tmp_path / "base")
    argv = [
        "--config", str(ROOT / "conf/weaver_sft.yaml"), "--config", str(ROOT / "conf/backbone/tiny.yaml"),
        "--config", str(ROOT / "conf/data/reasoning_gym.yaml"),
        "--model.memgen.backbone.name", str(tmp_path / "base"), "--data.environment.tasks.0.task=chain_sum",
        "--data.environment.train_size=16", "--data.environment.val_size=4", "--data.environment.test_size=4",
        "--data.environment.isolation=limits", "--data.environment.reward_workers=1",
        "--data.batch_size=4", "--model.generation.max_new_tokens=4",
        "--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert front_end.main(["fit", *argv]) == 0
    capsys.readouterr()
    assert front_end.main(["test", "--gold", *argv]) == 0
    assert "test: 4 of 4 reference answers are right" in capsys.readouterr().out
    assert front_end.main(["fit", *argv, "--data.environment.tasks", "[rush_hour]"]) != 0
    assert "rush_hour has no reference answers" in capsys.readouterr().err


@marked
@pytest.mark.slow
def test_every_task_has_items_whose_reference_is_right_and_whose_garbage_is_wrong(make):
    from reasoning_gym.factory import DATASETS

    names = [name for name in sorted(DATASETS) if name not in REFUSED]
    assert len(names) > 100
    environment = make(
        *[GymTask(name, EASY.get(name, {})) for name in names],
        train_size=len(names),
        isolation=ISOLATIONS[-1],
    )
    examples = environment.examples("train")
    assert {example.meta["task"] for example in examples if not example.target} == NO_REFERENCE
    answered = [example for example in examples if example.target]
    assert failing_references(environment, answered) == []
    for garbage in ("banana", "-31.5", "[[]]"):
        rewards = environment.rewards(examples, [garbage] * len(examples))
        fooled = [e.meta["task"] for e, reward in zip(examples, rewards, strict=True) if reward.total > 0]
        assert fooled == [], garbage
    start = time.monotonic()
    environment.close()
    assert time.monotonic() - start < 60
