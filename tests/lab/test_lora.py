"""LoRA-SFT of a reasoner: what a batch is made of, and what is learnt of a conversation."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from memgen.chat import conversation_ids, load_tokenizer
from memgen.lab import lora
from memgen.lab.english import EnglishLab
from memgen.lab.lora import Replay, train_lora
from memgen.model.adapters import LoraSettings
from memgen.training.optimizer import OptimizerSettings
from tiny_english import save_english_base

# PEFT asks for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

SETTINGS = {
    "lora": LoraSettings(r=2, alpha=4, dropout=0.0, target_modules=("q_proj", "v_proj")),
    "optimizer": OptimizerSettings(lr=1e-2),
    "steps": 2,
    "seed": 0,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    save_english_base(folder)
    return folder


@pytest.fixture
def batches(monkeypatch):
    """The batches that were learnt from."""
    seen = []
    loss = lora.supervised_loss
    monkeypatch.setattr(
        lora, "supervised_loss", lambda model, batch: seen.append(batch) or loss(model, batch)
    )
    return seen


def questions(base, batch):
    tokenizer = load_tokenizer(str(base))
    return [
        tokenizer.decode(ids[:length])
        for ids, length in zip(batch.ids.tolist(), batch.lengths.tolist(), strict=True)
    ]


def test_replay_takes_its_share_of_every_batch_from_the_kept_items(base, batches, tmp_path):
    earlier = [EnglishLab(("copy",), train_size=8), EnglishLab(("bill",), train_size=8)]
    own = EnglishLab(("shop",), train_size=8)
    train_lora(str(base), own, tmp_path, batch_size=4, replay=Replay(earlier, items=1, share=0.5), **SETTINGS)
    assert len(batches) == 2
    for batch in batches:
        texts = questions(base, batch)
        assert sum("What do" in text for text in texts) == 2
        # One item of each is kept.
        assert sum(earlier[0].examples("train")[0].question in text for text in texts) == 1
        assert sum(earlier[1].examples("train")[0].question in text for text in texts) == 1


def test_a_fine_tuned_reasoner_is_a_base_whose_weights_have_changed_the_same_way_again(base, tmp_path):
    trained = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        train_lora(str(base), EnglishLab(train_size=8), tmp_path / name, batch_size=2, **SETTINGS)
        trained.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, trained[0][name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in before)


@pytest.mark.parametrize("every_turn", [False, True])
def test_earlier_turns_are_part_of_the_question_or_learnt_too(base, batches, tmp_path, every_turn):
    environment = EnglishLab(("copy",), train_size=1)
    train_lora(str(base), environment, tmp_path, batch_size=1, every_turn=every_turn, **SETTINGS)
    chat = conversation_ids(
        load_tokenizer(str(base)), environment.conversation(environment.examples("train")[0])
    )
    assert len(chat.turns) == 2
    learnt = batches[0].supervised[0].nonzero().flatten().tolist()
    assert (chat.turns[0].prompt_end in learnt) == every_turn
    assert set(range(chat.turns[1].prompt_end, chat.turns[1].end)) <= set(learnt)
    assert chat.turns[1].prompt_end - 1 not in learnt


def test_batches_that_cannot_be_made_are_refused(base, tmp_path):
    own = EnglishLab(train_size=2)
    with pytest.raises(
        ValueError, match=r"a batch takes 3 training items of a task, but there are 2; set data.batch_size"
    ):
        train_lora(str(base), own, tmp_path, batch_size=3, **SETTINGS)
    with pytest.raises(
        ValueError, match=r"a batch of 1 has no room for replay; set data.batch_size to 2 or more"
    ):
        train_lora(
            str(base), own, tmp_path, batch_size=1, replay=Replay([own], items=2, share=0.5), **SETTINGS
        )


@pytest.mark.parametrize(("share", "size", "rows"), [(0.5, 32, 16), (0.01, 8, 1), (0.99, 8, 7), (0.3, 4, 1)])
def test_a_batch_has_rows_of_both(share, size, rows):
    assert Replay([], items=1, share=share).rows(size) == rows
