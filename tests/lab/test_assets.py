import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memgen.chat import conversation_ids
from memgen.conf_files import conf_file
from memgen.lab import assets, trained
from memgen.lab.assets import build_reasoner, build_tiny, resolve_asset
from memgen.lab.pretrain import ReasonerRecipe, pretrain_reasoner
from memgen.lab.tiny import MAX_CHARACTERS, read_text, tiny_tokenizer
from memgen.lab.tokenizer import lab_tokenizer
from memgen.lab.trained import is_trained

SMALL = ReasonerRecipe(
    recall_steps=3,
    steps=3,
    batch_size=4,
    hidden_size=16,
    layers=1,
    heads=2,
    key_value_heads=1,
    intermediate_size=16,
)
ROWS = [
    {"question": f"Anna buys {n} red apples, and {n + 1} green ones.", "answer": f"{2 * n + 1}"}
    for n in range(40)
]


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (directory / "test.jsonl").write_text(json.dumps({"question": "Zebras?"}) + "\n")
    return directory


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_a_reasoner_loads_with_the_auto_classes(home):
    path = build_reasoner(SMALL)
    assert path.is_relative_to(home)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    text = "shop : fig , nut , tea .\n4 , 1 , 5 .\n# 1 0"
    ids = tokenizer(text).input_ids
    assert ids == lab_tokenizer()(text).input_ids
    assert tokenizer.decode(ids) == text
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_is_loaded_is_what_was_trained(home):
    trained = pretrain_reasoner(SMALL, lab_tokenizer()).state_dict()
    loaded = weights(build_reasoner(SMALL))
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)


def test_a_seed_decides_the_weights(home):
    tokenizer = lab_tokenizer()
    first, again = (pretrain_reasoner(SMALL, tokenizer).state_dict() for _ in range(2))
    other = pretrain_reasoner(dataclasses.replace(SMALL, seed=1), tokenizer).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_pretraining_leaves_the_callers_state_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.inference_mode():
        pretrain_reasoner(SMALL, lab_tokenizer())
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_pretraining_lowers_the_loss(caplog):
    recipe = dataclasses.replace(SMALL, steps=200, batch_size=8, warmup_steps=5, learning_rate=1e-2)
    with caplog.at_level("INFO", logger="memgen.lab.pretrain"):
        pretrain_reasoner(recipe, lab_tokenizer())
    told = [record.getMessage() for record in caplog.records]
    losses = [float(message.rpartition(" ")[2]) for message in told if " of 200" in message]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.2


@pytest.mark.parametrize(
    "changed",
    [dataclasses.replace(SMALL, steps=4), dataclasses.replace(SMALL, seed=7)],
    ids=["steps", "seed"],
)
def test_another_recipe_is_built_anew(home, changed):
    assert build_reasoner(SMALL) != build_reasoner(changed)


def test_another_version_of_the_code_is_built_anew(home, monkeypatch):
    first = build_reasoner(SMALL)
    monkeypatch.setattr(assets, "RECIPE_VERSION", assets.RECIPE_VERSION + 1)
    assert build_reasoner(SMALL) != first


def test_a_reasoner_that_lost_a_file_is_built_again(home):
    path = build_reasoner(SMALL)
    before = weights(path)
    (path / "model.safetensors").unlink()
    assert build_reasoner(SMALL) == path
    after = weights(path)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_name_of_a_reasoner_tells_its_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(assets, "build_reasoner", lambda recipe: asked.append(recipe) or "path")
    for name in ("lab:reasoner", "lab:reasoner?seed=0", "lab:reasoner?seed=12"):
        assert resolve_asset(name) == "path"
    assert asked == [ReasonerRecipe(), ReasonerRecipe(), ReasonerRecipe(seed=12)]


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-1.5B-Instruct", "some/dir", "../here", "hf:there"])
def test_any_other_name_is_unchanged(name):
    assert resolve_asset(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "lab:reasoner?sed=1",
        "lab:reasoner?seed=x",
        "lab:reasoner?seed=",
        "lab:reasoner?seed=1&a=2",
        "lab:reasoner?5",
    ],
)
def test_bad_parameters_are_named(name):
    with pytest.raises(ValueError, match="its parameters are seed, each a number"):
        resolve_asset(name)


def test_an_unknown_asset_lists_those_that_there_are():
    with pytest.raises(ValueError, match=r"lab:reasonr.*lab:reasoner.*lab:weaver_sft"):
        resolve_asset("lab:reasonr")


@pytest.mark.parametrize("name", ["lab:weaver_sft?sed=1", "lab:weaver_grpo?base=x"])
def test_bad_parameters_of_a_trained_asset_are_named(name):
    with pytest.raises(ValueError, match="its parameters are seed and base, each a number"):
        resolve_asset(name)


@pytest.fixture
def trainings(monkeypatch):
    """What `memgen fit` was asked for: stage, values and the run's folder, in which it leaves checkpoints."""
    asked = []

    def fit(files, overrides, run):
        asked.append((files[0].stem, overrides, run))
        for kind in ("last", "best", "resume"):
            (run / kind).mkdir(parents=True, exist_ok=True)
        for kind in ("last", "best"):
            (run / kind / "memgen.json").write_text(f"{files[0].stem} {kind}")

    monkeypatch.setattr("memgen.lab.trained.fit", fit)
    return asked


def test_a_trained_asset_is_trained_once_and_what_it_starts_from_before_it(home, trainings):
    path = resolve_asset("lab:weaver_grpo?seed=3&base=2")
    assert (Path(path) / "memgen.json").read_text() == "weaver_grpo best"
    (half, half_settings, _), (grpo, grpo_settings, _) = trainings
    assert (half, grpo) == ("weaver_sft", "weaver_grpo")
    start = Path(grpo_settings["model.init_from"])
    assert (start / "memgen.json").read_text() == "weaver_sft best"
    assert half_settings["trainer.callbacks.2.stopping_threshold"] == 0.3
    assert "trainer.callbacks.2.class_path" not in grpo_settings
    for _, settings, run in trainings:
        assert settings["model.memgen.backbone.name"] == "lab:reasoner?seed=2"
        assert settings["seed_everything"] == settings["model.seed"] == settings["data.seed"] == 3
        assert not run.exists()
    assert resolve_asset("lab:weaver_grpo?seed=3&base=2") == path
    assert len(trainings) == 2
    assert resolve_asset("lab:weaver_grpo?seed=4&base=2") != path


def test_a_training_that_was_stopped_goes_on_in_its_run(home, monkeypatch):
    runs = []

    def fit(files, overrides, run):
        runs.append((run, run.exists()))
        (run / "best").mkdir(parents=True, exist_ok=True)
        (run / "best" / "memgen.json").write_text("best")
        if len(runs) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("memgen.lab.trained.fit", fit)
    with pytest.raises(KeyboardInterrupt):
        resolve_asset("lab:weaver_sft")
    assert not is_trained("weaver_sft", 0, assets.RECIPE_VERSION)
    path = Path(resolve_asset("lab:weaver_sft"))
    (first, before), (second, after) = runs
    assert first == second
    assert (before, after) == (False, True)
    assert first.is_relative_to(home)
    assert is_trained("weaver_sft", 0, assets.RECIPE_VERSION)
    assert not second.exists()
    assert (path / "memgen.json").read_text() == "best"


def test_the_rest_of_a_training_goes_on_in_the_run_that_was_stopped_early(home, trainings):
    resolve_asset("lab:smollm2_trigger_rl?seed=1")
    (_, half, half_run), (_, rest, rest_run), (trigger, settings, trigger_run) = trainings
    assert half_run == rest_run != trigger_run
    assert half["trainer.callbacks.2.stopping_threshold"] < rest["trainer.callbacks.2.stopping_threshold"]
    assert half["trainer.val_check_interval"] == rest["trainer.val_check_interval"]
    assert "model.init_from" not in rest
    # The backbone is the overlays'.
    assert not any("model.memgen.backbone.name" in given for given in (half, rest, settings))
    assert trigger == "trigger_rl"
    assert Path(settings["model.init_from"]).name.startswith("lab-smollm2_weaver_sft-")
    assert not any(run.exists() for run in (rest_run, trigger_run))
    with pytest.raises(ValueError, match="its parameters are seed, each a number"):
        resolve_asset("lab:smollm2_trigger_rl?base=1")


def test_other_settings_of_an_earlier_stage_are_another_asset(home, trainings, monkeypatch, tmp_path):
    before = resolve_asset("lab:smollm2_weaver_grpo")
    changed = tmp_path / "weaver_sft.yaml"
    changed.write_text(conf_file("smollm2/weaver_sft.yaml").read_text() + "# changed\n")
    monkeypatch.setattr(
        trained, "conf_file", lambda name: changed if name == "smollm2/weaver_sft.yaml" else conf_file(name)
    )
    assert resolve_asset("lab:smollm2_weaver_grpo") != before


def test_tiny_is_a_small_chat_model_of_the_datas_own_text(home, data):
    path = resolve_asset(f"tiny:{data}")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer) <= 2048
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer(" apples").input_ids) == 1  # a word of the data
    chat = conversation_ids(
        tokenizer, [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "12 ü."}]
    )
    (turn,) = chat.turns
    assert tokenizer.decode(chat.ids[turn.prompt_end : turn.end]) == "12 ü.<|im_end|>"


def test_tinys_tokenizer_is_loaded_as_it_was_made(home, data):
    made = tiny_tokenizer(read_text(data), vocab_size=2048, max_length=4096)
    loaded = AutoTokenizer.from_pretrained(build_tiny(data))
    for text in ("Anna's 48/2 = <<48/2=24>>24.\n\n#### 72", "  ünïcode 日本 <|im_end|>\n x", "a\tb"):
        assert loaded(text).input_ids == made(text).input_ids
        assert loaded.decode(loaded(text).input_ids) == text


def test_other_text_makes_another_tiny(home, data):
    first = build_tiny(data)
    assert build_tiny(data) == first
    with (data / "train.jsonl").open("a") as lines:
        lines.write(json.dumps({"question": "More."}) + "\n")
    assert build_tiny(data) != first


def test_train_is_read_first_and_every_string_of_it(data):
    (data / "a.json").write_text(json.dumps([{"deep": ["inside"]}, 3]))
    text = read_text(data)
    assert text.startswith(ROWS[0]["question"] + "\n" + ROWS[0]["answer"])
    assert "Zebras?" in text
    assert "inside" in text


def test_long_text_is_cut(tmp_path):
    (tmp_path / "long.txt").write_text("abc " * MAX_CHARACTERS)
    assert len(read_text(tmp_path / "long.txt")) == MAX_CHARACTERS


def test_a_broken_line_is_named(data):
    with (data / "train.jsonl").open("a") as lines:
        lines.write("{broken\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 41: not valid JSON"):
        resolve_asset(f"tiny:{data}")


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve_asset(f"tiny:{tmp_path / 'nowhere'}")


def test_a_directory_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no text"):
        resolve_asset(f"tiny:{tmp_path}")
