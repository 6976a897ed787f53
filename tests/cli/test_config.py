"""Files and overrides become one resolved document."""

from __future__ import annotations

import math

import pytest

from memgen.cli import config
from memgen.cli.config import Request
from memgen.cli.errors import UsageError


def read(*argv: str) -> config.Document:
    layers = Request.from_argv(argv).layers()
    return config.resolve(config.merge(layers), layers)


@pytest.fixture
def write(folder):
    def write(name: str, text: str) -> str:
        (folder / name).write_text(text)
        return name

    return write


def test_later_files_win_and_mappings_merge_deeply(write):
    write("a.yaml", "x: {one: 1, two: {deep: 2, kept: 3}}\nitems: [1, 2]\n")
    write("b.yaml", "x: {two: {deep: 20}}\nitems: [9]\n")
    merged = read("--config", "a.yaml", "--config=b.yaml")
    assert merged == {"x": {"one": 1, "two": {"deep": 20, "kept": 3}}, "items": [9]}
    assert read("-c", "b.yaml", "-c", "a.yaml")["x"]["two"]["deep"] == 2


def test_references_cross_files_and_follow_overrides(write):
    write("a.yaml", "model: {memgen: {backbone: {name: small}}}\n")
    write("b.yaml", "data:\n  path: /data/${model.memgen.backbone.name}\n")
    assert read("--config", "a.yaml", "--config", "b.yaml")["data"]["path"] == "/data/small"
    overridden = read("--config", "a.yaml", "--model.memgen.backbone.name", "large", "--config", "b.yaml")
    assert overridden["data"]["path"] == "/data/large"


def test_an_override_may_be_a_reference(write):
    write("a.yaml", "x: 1\ny: 2\n")
    assert read("--config", "a.yaml", "--y", "${x}")["y"] == 1


def test_variables_of_ones_own_end_with_the_resolution(write):
    write("a.yaml", "vars: {size: 32}\n")
    write("b.yaml", "data:\n  batch_size: ${vars.size}\n")
    files = ("--config", "a.yaml", "--config", "b.yaml")
    assert read(*files) == {"data": {"batch_size": 32}}
    assert read(*files, "--vars.size", "64") == {"data": {"batch_size": 64}}


@pytest.mark.parametrize("key", ["", "model.init_args.", "data.environment.", "callbacks.1."])
@pytest.mark.parametrize("between", ["", "init_args."], ids=["short", "through init_args"])
def test_init_args_may_be_left_out_or_written(write, key, between):
    """Wherever a class may stand: a section, an argument of a class, an item of a list."""
    section = key.replace("init_args.", "").rstrip(".").split(".")[0]
    old = "{class_path: C, init_args: {path: old, size: 1}}"
    documents = {
        "": f"thing: {old}",
        "model": f"model: {{class_path: M, init_args: {{thing: {old}}}}}",
        "data": f"data: {{environment: {{class_path: E, thing: {old}}}}}",
        "callbacks": f"callbacks: [{{class_path: A}}, {{class_path: B, init_args: {{thing: {old}}}}}]",
    }
    write("a.yaml", documents[section] + "\n")
    reference = f"{key}thing.{between}path".replace(".1.", "[1].")
    write("b.yaml", f"y: '${{{reference}}}'\n")
    document = read("-c", "a.yaml", "-c", "b.yaml", f"--{key}thing.{between}path", "new")
    assert document.pop("y") == "new"
    thing = {"class_path": "C", "path": "new", "size": 1}
    assert (
        document
        == {
            "": {"thing": thing},
            "model": {"model": {"class_path": "M", "thing": thing}},
            "data": {"data": {"environment": {"class_path": "E", "thing": thing}}},
            "callbacks": {"callbacks": [{"class_path": "A"}, {"class_path": "B", "thing": thing}]},
        }[section]
    )
    assert config.without_init_args(config.with_init_args(document)) == document


def test_the_arguments_of_every_class_go_below_init_args_for_jsonargparse():
    document = {"a": {"class_path": "A", "x": 1, "b": [{"class_path": "B"}], "record": {"y": 2}}}
    assert config.with_init_args(document) == {
        "a": {"class_path": "A", "init_args": {"x": 1, "b": [{"class_path": "B"}], "record": {"y": 2}}}
    }


def test_another_class_replaces_the_arguments_of_the_first(write):
    write("a.yaml", "data: {environment: {class_path: A, init_args: {only_a: 1}}, batch_size: 4}\n")
    write("b.yaml", "data: {environment: {class_path: B, init_args: {only_b: 2}}}\n")
    write("c.yaml", "data: {environment: {init_args: {more: 3}}}\n")
    environment = read("-c", "a.yaml", "-c", "b.yaml", "-c", "c.yaml")["data"]["environment"]
    assert environment == {"class_path": "B", "only_b": 2, "more": 3}


def test_a_bare_section_names_its_class(write):
    write("a.yaml", "model: {class_path: A, x: 1}\n")
    assert read("--config", "a.yaml", "--model", "A", "--model.x", "2") == {
        "model": {"class_path": "A", "x": 2}
    }


def test_an_override_reaches_into_a_list(write):
    write("a.yaml", "trainer: {callbacks: [{class_path: A, init_args: {x: 1}}, {class_path: B}]}\n")
    callbacks = read("--config", "a.yaml", "--trainer.callbacks.0.x", "5")["trainer"]["callbacks"]
    assert callbacks == [{"class_path": "A", "x": 5}, {"class_path": "B"}]
    with pytest.raises(UsageError, match="item 3 does not exist: the list has 2 items"):
        read("--config", "a.yaml", "--trainer.callbacks.3.class_path", "C")
    with pytest.raises(UsageError, match="item 2 does not exist: the list has 2 items"):
        read("--config", "a.yaml", "--trainer.callbacks.2.x", "5")


def test_an_override_appends_an_object_to_a_list(write):
    write("a.yaml", "trainer: {callbacks: [{class_path: A}]}\n")
    named, value = "--trainer.callbacks.1.class_path", "--trainer.callbacks.1.x"
    callbacks = read("--config", "a.yaml", named, "C", value, "5")["trainer"]["callbacks"]
    assert callbacks == [{"class_path": "A"}, {"class_path": "C", "x": 5}]


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("5", 5),
        ("-1", -1),
        ("1e-4", 1e-4),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("'5'", "5"),
        ("32-true", "32-true"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("lab:reasoner", "lab:reasoner"),
        ("a: b", "a: b"),
        ("a # b", "a # b"),
        ("#", "#"),
        ("2024-01-01", "2024-01-01"),
        ("a=b", "a=b"),
        ("@x", "@x"),
        ("", ""),
    ],
)
def test_an_override_is_typed_like_yaml(write, typed, value):
    write("a.yaml", "x: 0\n")
    for argv in (["--x", typed], [f"--x={typed}"]):
        got = read("--config", "a.yaml", *argv)["x"]
        assert got == value
        assert type(got) is type(value)


def test_infinity_is_a_number():
    assert math.isinf(config.parse_value(".inf"))


def test_a_later_override_wins_and_both_of_a_section_stay(write):
    write("a.yaml", "x: 0\n")
    assert read("--config", "a.yaml", "--t.a", "1", "--t.b", "2", "--t.a", "3")["t"] == {"a": 3, "b": 2}


def test_an_empty_file_and_comments_are_fine(write):
    write("empty.yaml", "")
    write("comment.yaml", "# nothing here\n")
    assert read("--config", "empty.yaml", "--config", "comment.yaml", "--x", "1") == {"x": 1}


def test_text_that_looks_like_a_reference_survives_the_round_trip(write):
    write("a.yaml", "x: '\\${not.a.reference}'\n")
    document = read("--config", "a.yaml")
    assert document == {"x": "${not.a.reference}"}
    write("b.yaml", config.to_yaml(document))
    assert read("--config", "b.yaml") == document


def test_checkpoint_is_short_for_init_from(write):
    write("a.yaml", "model: {class_path: A}\n")
    assert read("--config", "a.yaml", "--checkpoint", "runs/x")["model"]["init_from"] == "runs/x"


REFUSED = {
    "no config": ((), "--config is missing; for example: --config conf/weaver_sft.yaml"),
    "no value": (("--config", "a.yaml", "--x"), "--x needs a value"),
    "no value before an option": (("--config", "a.yaml", "--x", "--y", "1"), "--x needs a value"),
    "not an option": (("--config", "a.yaml", "x=1"), "'x=1' is not an option"),
    "mistyped option": (("--confg", "a.yaml"), "unknown option --confg; did you mean --config?"),
    "mistyped file": (("--config", "weaver.yml"), "weaver.yml does not exist; did you mean weaver_sft.yaml?"),
    "unlike file": (("--config", "q.yaml"), "q.yaml does not exist; . has: a.yaml, "),
    "no folder": (("--config", "nowhere/a.yaml"), "there is no folder nowhere"),
    "a folder": (("--config", "."), ". is a folder"),
    "broken YAML": (("--config", "broken.yaml"), "broken.yaml:3: not valid YAML: "),
    "a key twice": (("--config", "twice.yaml"), "twice.yaml:2: not valid YAML: found duplicate key a"),
    "a list": (
        ("--config", "list.yaml"),
        "list.yaml: a configuration is a mapping of keys to values, got a list",
    ),
    "broken override": (("--config", "a.yaml", "--x", "[1"), "the value [1 is not valid YAML"),
    "dangling reference": (
        ("--config", "dangling.yaml"),
        "x.y (dangling.yaml) refers to ${data.pth}, which is not set; did you mean ${data.path}?",
    ),
    "dangling in a list": (
        ("--config", "a.yaml", "--l", "['${no}']"),
        "l.0 (the command line) refers to ${no}",
    ),
    "circle": (("--config", "circle.yaml"), "refers to itself"),
    "mandatory": (
        ("--config", "mandatory.yaml"),
        "x (mandatory.yaml) is marked ??? and needs a value: --x VALUE",
    ),
    "environment": (("--config", "env.yaml"), "Environment variable 'NO_SUCH_NAME' not found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_told_in_one_line(write, case):
    write("a.yaml", "x: 1\n")
    write("weaver_sft.yaml", "x: 1\n")
    write("broken.yaml", "a: 1\nb: [1\nc: 2\n")
    write("twice.yaml", "a: 1\na: 2\n")
    write("list.yaml", "- 1\n")
    write("dangling.yaml", "data: {path: /d}\nx:\n  y: ${data.pth}\n")
    write("circle.yaml", "x: ${y}\ny: ${x}\n")
    write("mandatory.yaml", "x: ???\n")
    write("env.yaml", "x: ${oc.env:NO_SUCH_NAME}\n")
    argv, message = REFUSED[case]
    with pytest.raises(UsageError) as refusal:
        read(*argv)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
