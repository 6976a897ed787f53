"""The lab's table: its figures against figures by hand, and its conditions on a random model."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

from memgen.lab.environment import ConstantAnswer, Lab
from memgen.lab.report import (
    Checkpoints,
    Condition,
    LabReport,
    Questions,
    base_hash,
    held_out,
    report_on_stages,
)
from memgen.lab.saving import save_backbone
from memgen.lab.tokenizer import lab_tokenizer
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig, load_backbone
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.results.controls import Outcome
from memgen.training.checkpoint import save_checkpoint
from tiny import tiny_memgen


def outcome(name: str, rewards: list[float], insertions: float = 0.0, **parts: float) -> Outcome:
    return Outcome(
        name=name, rewards=tuple(rewards), parts=parts, insertions=insertions, offered=4.0, cpu_seconds=1.5
    )


REPORT = LabReport(
    split="test",
    items=8,
    constant=ConstantAnswer(completion="1 , 2 .\n# 3", total=0.02, answer="3", answer_accuracy=0.21),
    conditions=(
        Condition(outcome("alone", [0.0] * 8, answer=0.25), outcome("alone", [1.0, 1.0, 0.0, 1.0])),
        Condition(outcome("trained", [1.0] * 6 + [0.0] * 2, insertions=3.5, answer=0.875)),
    ),
    base_hash="ab",
)


def printed(report: LabReport, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(report.table())
    return out.getvalue().splitlines()


def test_the_table_has_a_line_for_each_condition_in_per_cent():
    lines = printed(REPORT)
    constant, alone, trained = (
        next(line for line in lines if line.strip().startswith(name))
        for name in ("best constant answer", "alone", "trained")
    )
    assert constant.split()[-2:] == ["2.0", "21.0"]
    low, high = REPORT.conditions[1].outcome.interval()
    assert alone.split() == ["alone", "0.0", "0.0", "to", "0.0", "25.0", "0.0", "75.0"]
    assert trained.split() == [
        *("trained", "75.0", f"{100 * low:.1f}", "to", f"{100 * high:.1f}", "87.5", "3.5"),
    ]
    assert low < 0.75 < high


def test_the_table_fits_into_eighty_columns():
    wide = max(REPORT.conditions, key=lambda c: len(c.outcome.name)).outcome
    named = dataclasses.replace(wide, name="weaver SFT, all boundaries")
    report = dataclasses.replace(REPORT, conditions=(Condition(named, named),))
    # Nothing is cut or wrapped that a wide terminal would show in one line.
    narrow, roomy = ([line.split() for line in printed(report, width)] for width in (80, 300))
    words = [[word for line in lines for word in line if not set(word) <= {"─"}] for lines in (narrow, roomy)]
    assert words[0] == words[1]
    assert any("weaver SFT, all boundaries" in line and " to " in line for line in printed(report))


def test_the_record_is_json_and_has_what_the_table_has():
    record = json.loads(json.dumps(REPORT.as_dict()))
    assert (record["split"], record["items"], record["base_hash"]) == ("test", 8, "ab")
    assert record["constant_completion"] == {"text": "1 , 2 .\n# 3", "exact": 0.02}
    assert record["constant_answer"] == {"text": "3", "answer": 0.21}
    trained = record["conditions"]["trained"]
    assert trained["exact"] == 0.75
    assert trained["interval_95"] == list(REPORT.conditions[1].outcome.interval())
    assert trained["part_answer"] == 0.875
    assert trained["insertions_per_answer"] == 3.5
    assert trained["others"] is None
    assert record["conditions"]["alone"]["others"]["exact"] == 0.75


def test_the_base_hash_sees_the_frozen_weights_and_nothing_else():
    model = tiny_memgen()
    before = base_hash(model.reasoner.backbone)
    with torch.no_grad():
        for parameter in model.weaver.own_parameters().values():
            parameter += 1.0
    assert base_hash(model.reasoner.backbone) == before
    with torch.no_grad():
        next(p for n, p in model.reasoner.backbone.named_parameters() if ".lora_" not in n).flatten()[0] += (
            1.0
        )
    assert base_hash(model.reasoner.backbone) != before


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random weavers, and a trigger that never invokes, on a random model with the lab's tokenizer."""
    folder = tmp_path_factory.mktemp("lab")
    tokenizer = lab_tokenizer()
    torch.manual_seed(0)
    settings = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    (folder / "base").mkdir()
    save_backbone(Qwen2ForCausalLM(settings), tokenizer, folder / "base")
    lora = LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj"))
    made = {}
    for name, kind in (("weaver", "always"), ("half", "always"), ("grpo", "always"), ("trigger", "tokens")):
        config = MemGenConfig(
            backbone=BackboneConfig(name=str(folder / "base"), dtype="float32"),
            weaver=WeaverConfig(prompt_latents=2, inference_latents=2, lora=lora),
            trigger=TriggerConfig(kind=kind, lora=lora, initial_invoke_bias=-60.0),
            boundaries=BoundaryConfig(delimiters=(",", ".", "\n"), max_inference_insertions=3),
        )
        model = MemGenModel.build(config, tokenizer, str)
        with torch.no_grad():
            for parameter in model.weaver.own_parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape)
        save_checkpoint(model, config, folder / name, with_trigger=kind == "tokens")
        made[name] = folder / name
    return Checkpoints(**made)


def test_each_condition_is_what_its_name_says(checkpoints):
    told = []
    report = report_on_stages(checkpoints, "val", Questions.lab(12), progress=told.append)
    rows = {condition.outcome.name.strip(): condition for condition in report.conditions}
    assert told == list(rows)
    assert report.items == 12
    assert all(len(row.outcome.rewards) == 12 for row in rows.values())
    woven = {name: row.outcome.insertions for name, row in rows.items()}
    assert woven["reasoner alone"] == 0.0
    assert woven["prompt end only"] == 1.0
    assert woven["weaver SFT, all boundaries"] >= 1.0
    # The trigger of this checkpoint skips everywhere, so its answers are the reasoner's own.
    assert woven["weaver SFT and trigger RL"] == 0.0
    assert rows["weaver SFT and trigger RL"].outcome.rewards == rows["reasoner alone"].outcome.rewards
    asked = [name for name, row in rows.items() if row.others is not None]
    assert asked == ["reasoner alone", "weaver SFT, all boundaries", "weaver SFT and trigger RL"]
    base = load_backbone(BackboneConfig(name=str(checkpoints.weaver.parent / "base"), dtype="float32"), str)
    assert report.base_hash == base_hash(base)


def test_an_interrupted_report_goes_on_with_the_condition_that_it_was_at(checkpoints, tmp_path):
    whole = report_on_stages(checkpoints, "val", Questions.lab(6))

    def stop(name):
        if name == "prompt end only":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report_on_stages(checkpoints, "val", Questions.lab(6), progress=stop, keep=tmp_path)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(kept) == 3
    resumed = report_on_stages(checkpoints, "val", Questions.lab(6), keep=tmp_path)
    assert {name: (tmp_path / name).read_text() for name in kept} == kept
    assert without_times(resumed) == without_times(whole)


def without_times(report: LabReport) -> list[object]:
    def timeless(found: Outcome | None) -> Outcome | None:
        return None if found is None else dataclasses.replace(found, cpu_seconds=0.0)

    return [(timeless(row.outcome), timeless(row.others)) for row in report.conditions]


def test_worked_examples_are_earlier_turns_from_the_training_split():
    lab = Lab(val_size=4)
    tokenizer = lab_tokenizer()
    plain, shown = (held_out(lab, "val", tokenizer, 24, shots=shots) for shots in (0, 2))
    first, second, *_ = lab.examples("train")
    texts = [tokenizer.decode(ids) for ids in shown.prompts]
    for text, without in zip(texts, plain.prompts, strict=True):
        assert text.index(first.target) < text.index(second.question.strip()) < text.index(second.target)
        assert text.endswith(tokenizer.decode(without))
