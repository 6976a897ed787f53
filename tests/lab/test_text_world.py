import random
from collections import Counter

import pytest

from memgen.chat import conversation_ids, prompt_ids
from memgen.environments.base import InteractiveEnvironment
from memgen.lab.documents import words
from memgen.lab.text_world import MAX_TURNS, TextWorld, optimal_actions
from memgen.lab.tokenizer import lab_tokenizer
from memgen.lab.world import ITEMS, ROOMS, World

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def world():
    return TextWorld()


@pytest.fixture(scope="module")
def tokenizer():
    return lab_tokenizer()


def play(environment, example, actions):
    episode = environment.episode()
    assert episode.reset(example).text == ""
    steps = [episode.step(action) for action in actions]
    return episode, steps


@pytest.mark.parametrize("split", SPLITS)
def test_the_optimal_policy_wins_every_episode(world, split):
    for example in world.examples(split):
        actions = optimal_actions(example)
        episode, steps = play(world, example, actions)
        assert [step.done for step in steps] == [*[False] * (len(actions) - 1), True]
        reward = episode.reward()
        assert reward.total == 1.0
        assert reward.parts == {"success": 1.0, "turns": len(actions), "invalid": 0.0}
        assert len(actions) <= MAX_TURNS - 2


def test_no_shorter_way_wins(world):
    """Every episode needs to take and to put, and to be in two different rooms."""
    for example in world.examples("val"):
        meta = example.meta
        moves = 1 if meta["start"] == meta["homes"][meta["thing"]] else 2
        assert len(optimal_actions(example)) == 2 + moves


def test_the_optimal_conversation_is_what_the_episode_says(world):
    for example in world.examples("val"):
        messages = world.conversation(example)
        assert messages[0] == {"role": "user", "content": example.question}
        actions = [m["content"] for m in messages if m["role"] == "assistant"]
        shown = [m["content"] for m in messages[1:] if m["role"] == "user"]
        _, steps = play(world, example, actions)
        assert actions == optimal_actions(example)
        assert shown == [step.observation for step in steps[:-1]]
        assert messages[-1]["role"] == "assistant"


def test_an_episode_reads_as_documented():
    world = TextWorld()
    example = next(e for e in world.examples("train") if len(optimal_actions(e)) == 4)
    homes, thing, goal = example.meta["homes"], example.meta["thing"], example.meta["goal"]
    episode = world.episode()
    episode.reset(example)
    assert example.question.startswith(f"task : bring {thing} to {goal} .\n{example.meta['start']} : ")
    seen = episode.step(f"go {homes[thing]}").observation
    assert seen.startswith(f"{homes[thing]} : ")
    assert thing in seen.split()
    assert episode.step(f"take {thing}").observation == f"hold {thing} .\n"
    there = episode.step(f"go {homes[goal]}")
    assert goal in there.observation.split()
    assert not there.done
    assert episode.step(f"put {thing}").done


@pytest.mark.parametrize(
    "action",
    ["", "go", "go moon", "take salt pie", "put fig", "fly", "go hall go den", "go hall\ngo den", "<end>"],
)
def test_an_impossible_action_is_answered_and_changes_nothing(world, action):
    example = world.examples("val")[0]
    episode, (step,) = play(world, example, [action])
    assert step.observation == "nothing .\n"
    assert not step.done
    assert step.fault is None
    assert episode.reward().parts == {"success": 0.0, "turns": 1.0, "invalid": 1.0}
    assert episode.admissible() == list(example.meta["admissible"])


def test_going_where_one_is_and_taking_with_full_hands_are_impossible(world):
    example = next(e for e in world.examples("train") if len(optimal_actions(e)) == 4)
    home = example.meta["homes"][example.meta["thing"]]
    episode, steps = play(world, example, [f"go {home}", f"go {home}", f"take {example.meta['thing']}"])
    assert steps[1].observation == "nothing .\n"
    assert not any(action.startswith("take") for action in episode.admissible())


def test_another_thing_can_be_taken_and_put_down_again(world):
    example = next(
        e for e in world.examples("train") if any(a.startswith("take") for a in e.meta["admissible"])
    )
    action = next(a for a in example.meta["admissible"] if a.startswith("take"))
    other = action.removeprefix("take ")
    episode, (taken, put) = play(world, example, [action, f"put {other}"])
    assert taken.observation == f"hold {other} .\n"
    assert other in put.observation.split()
    assert episode.admissible() == list(example.meta["admissible"])


def test_admissible_actions_are_those_that_are_not_refused(world):
    rng = random.Random(0)
    for example in rng.sample(list(world.examples("train")), 20):
        episode = world.episode()
        episode.reset(example)
        everything = [f"{verb} {what}" for verb in ("go", "take", "put") for what in (*ROOMS, *ITEMS)]
        for _ in range(world.max_turns - 1):
            allowed = episode.admissible()
            refused = rng.choice([action for action in everything if action not in allowed])
            twin = world.episode()
            twin.reset(example)
            assert set(allowed) <= set(everything)
            if episode.house.held is None and twin.house.rooms == episode.house.rooms:
                twin.house.here = episode.house.here
                assert twin.step(refused).observation == "nothing .\n"
            step = episode.step(rng.choice(allowed))
            assert step.observation != "nothing .\n"
            if step.done:
                break


def test_an_episode_is_cut_at_its_turns(world):
    example = world.examples("test")[0]
    episode, steps = play(world, example, ["nothing"] * MAX_TURNS)
    assert [step.done for step in steps] == [*[False] * (MAX_TURNS - 1), True]
    assert episode.reward().total == 0.0
    with pytest.raises(RuntimeError, match="the episode is over"):
        episode.step("go hall")


def test_an_episode_can_be_reset(world):
    example, other = world.examples("test")[:2]
    episode, _ = play(world, example, optimal_actions(example))
    episode.reset(other)
    assert episode.reward().parts == {"success": 0.0, "turns": 0.0, "invalid": 0.0}
    assert episode.admissible() == list(other.meta["admissible"])


def test_an_episode_must_be_reset_first(world):
    with pytest.raises(RuntimeError, match="reset"):
        world.episode().step("go hall")


def test_one_action_alone_never_solves_a_task(world):
    for example in world.examples("val"):
        assert world.reward(example, example.target).total == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_pairs_of_things_are_held_out_and_homes_are_not(seed):
    world = TextWorld(seed, val_size=100)
    pairs = {
        split: {frozenset((e.meta["thing"], e.meta["goal"])) for e in world.examples(split)}
        for split in SPLITS
    }
    assert not pairs["train"] & pairs["test"]
    assert not pairs["train"] & pairs["val"]
    assert not pairs["val"] & pairs["test"]
    assert set().union(*pairs["train"]) == set(ITEMS)


def test_defaults_hold_out_at_least_500_different_tasks(world):
    for split in SPLITS:
        questions = [example.question for example in world.examples(split)]
        assert len(questions) == len(set(questions))
    assert len(world.examples("test")) >= 500


@pytest.mark.parametrize("seed", range(5))
def test_every_room_keeps_one_or_two_things(seed):
    homes = World(seed).homes()
    assert set(homes) == set(ITEMS)
    counts = Counter(homes.values())
    assert set(counts) == set(ROOMS)
    assert set(counts.values()) == {1, 2}
    assert homes == World(seed).homes()
    assert homes != World(seed + 1).homes()


def test_the_tokenizer_knows_every_word(world, tokenizer):
    for example in world.examples("val"):
        ids = conversation_ids(tokenizer, world.conversation(example))
        assert tokenizer.unk_token_id not in ids.ids
        assert ids.ids[: ids.turns[0].prompt_end] == prompt_ids(tokenizer, world.messages(example))
        for (begin, end), action in zip(ids.turns, optimal_actions(example), strict=True):
            assert tokenizer.convert_ids_to_tokens(ids.ids[begin:end]) == [*words(action), "<end>"]


def test_an_action_is_told_from_its_decoded_text(world, tokenizer):
    """Decoding a sampled turn gives a text that the episode takes."""
    example = world.examples("val")[0]
    for action in example.meta["admissible"]:
        text = tokenizer.decode(
            [*tokenizer(action).input_ids, tokenizer.eos_token_id], skip_special_tokens=True
        )
        _, (step,) = play(world, example, [text])
        assert step.observation != "nothing .\n"


def test_it_is_an_interactive_environment(world):
    assert isinstance(world, InteractiveEnvironment)
    assert world.max_turns == MAX_TURNS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"test_size": 0}, "test_size must be at least 1"), ({"max_turns": 0}, "max_turns must be at least 1")],
    ids=["size", "turns"],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextWorld(**arguments)


def test_more_tasks_than_the_split_has_is_an_error():
    with pytest.raises(ValueError, match="set it lower"):
        TextWorld(val_size=5000).examples("val")
