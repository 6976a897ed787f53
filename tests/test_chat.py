from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memgen.chat import CHATML, conversation_ids, end_of_turn_id, load_tokenizer, prompt_ids

GOLDEN = Path(os.environ.get("MEMGEN_GOLDEN", Path(__file__).parents[1].parent / "shared" / "golden"))

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "tool", "content": "checked"},
    {"role": "assistant", "content": "Yes,\n\nindeed.\n"},
]

# Like Llama's: no white space behind the end of a turn.
TIGHT = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# Like Qwen3's: only the last answer shows that there was (no) thought.
THINKING = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if loop.last and m['role'] == 'assistant' -%}{{- '<think></think>' -}}{%- endif -%}"
    "{{- m['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
PLAIN = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] + '\n' -}}{%- endfor -%}"


def bpe_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """Byte-level with merges ("\\n\\n" is one token), without a chat template; pad = end token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["assistant\n\n\n", "user\n\n\n", "the answer is the answer\n\n"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=special_tokens[-1], pad_token=special_tokens[-1]
    )


TOKENIZER = bpe_tokenizer("<|im_start|>", "<|im_end|>")


def turns_as_text(tokens) -> list[str]:
    return [TOKENIZER.decode(tokens.ids[turn.prompt_end : turn.end]) for turn in tokens.turns]


def test_without_a_template_of_its_own_a_tokenizer_speaks_chatml():
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, CHAT[:2])) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_with_a_template_keeps_it_unless_another_is_given():
    tokenizer = bpe_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = TIGHT
    assert tokenizer.decode(prompt_ids(tokenizer, CHAT[1:2])).endswith("<|im_end|><|im_start|>assistant\n")
    assert prompt_ids(tokenizer, CHAT[1:2], CHATML) == prompt_ids(TOKENIZER, CHAT[1:2])


@pytest.mark.parametrize("template", [None, TIGHT], ids=["chatml", "tight"])
def test_a_turn_is_the_assistants_text_and_its_end_token_without_the_header(template):
    tokens = conversation_ids(TOKENIZER, CHAT, template)
    assert turns_as_text(tokens) == ["It is 2.<|im_end|>", "Yes,\n\nindeed.\n<|im_end|>"]
    for turn, messages in zip(tokens.turns, (CHAT[:2], CHAT[:4]), strict=True):
        assert tokens.ids[: turn.prompt_end] == prompt_ids(TOKENIZER, messages, template)
    assert end_of_turn_id(TOKENIZER, template) == TOKENIZER.convert_tokens_to_ids("<|im_end|>")


WORDS = st.text(alphabet="abé ,.\n<|>#1", min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and text
)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), st.sampled_from([None, TIGHT]))
def test_every_turn_continues_exactly_the_prompt_that_decoding_starts_from(pairs, template):
    messages = []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokens = conversation_ids(TOKENIZER, messages, template)
    assert turns_as_text(tokens) == [answer + "<|im_end|>" for _, answer in pairs]
    for number, turn in enumerate(tokens.turns):
        assert tokens.ids[: turn.prompt_end] == prompt_ids(TOKENIZER, messages[: 2 * number + 1], template)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_way_out():
    assert len(conversation_ids(TOKENIZER, CHAT[:3], THINKING).turns) == 1
    with pytest.raises(
        ValueError, match=r"renders message 2 \(assistant\) differently.*chat_template: chatml"
    ):
        conversation_ids(TOKENIZER, CHAT, THINKING)


def test_a_template_without_an_end_of_turn_token_is_refused():
    with pytest.raises(ValueError, match=r"without a special token.*chat_template: chatml"):
        conversation_ids(TOKENIZER, CHAT[1:3], PLAIN)


def test_text_that_merges_with_the_header_is_named():
    messages = [CHAT[1], {"role": "assistant", "content": "\n\nYes."}]
    with pytest.raises(
        ValueError, match=r"merges the header of message 1 \(assistant\) .* begins with '\\n\\nYes"
    ):
        conversation_ids(TOKENIZER, messages)


def test_an_end_token_inside_a_turn_is_refused():
    messages = [CHAT[1], {"role": "assistant", "content": "Yes<|im_end|>No"}]
    with pytest.raises(ValueError, match=r"contains the end-of-turn token <\|im_end\|>"):
        conversation_ids(TOKENIZER, messages)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no assistant message"),
        (CHAT[:2], "no assistant message"),
        ([{"role": "user", "content": " \n"}, CHAT[2]], r"the prompt of message 1 \(assistant\) is empty"),
        ([CHAT[2]], r"the prompt of message 0 \(assistant\) is empty"),
        ([CHAT[1], {"role": "assistant", "content": " "}], r"message 1 \(assistant\) is empty"),
    ],
)
def test_empty_prompts_and_completions_are_named(messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        conversation_ids(TOKENIZER, messages)


def test_an_empty_prompt_cannot_be_decoded_from():
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_ids(TOKENIZER, [{"role": "user", "content": ""}])


def test_a_tokenizer_that_cannot_write_chatml_is_refused():
    with pytest.raises(ValueError, match=r"needs the special tokens <\|im_start\|> and <\|im_end\|>"):
        prompt_ids(bpe_tokenizer("</s>"), CHAT[:2])


def test_an_absent_tokenizer_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer 'nobody/nothing' is no directory") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert conversation_ids(load_tokenizer(str(tmp_path)), CHAT) == conversation_ids(TOKENIZER, CHAT)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there is no golden data in {GOLDEN} (set MEMGEN_GOLDEN)")
def test_the_golden_conversation_gives_the_golden_ids():
    tokenizer = load_tokenizer(str(GOLDEN))
    case = GOLDEN / "K4" / "train_conv_allturns.safetensors"
    with safe_open(case, framework="pt") as tensors:
        ids = tensors.get_tensor("input_ids")[0].tolist()
        supervised = (tensors.get_tensor("supervised_labels")[0] != -100).tolist()
    messages = json.loads((GOLDEN / "K4" / "train_conv_messages.json").read_text(encoding="utf-8"))
    tokens = conversation_ids(tokenizer, messages)
    assert tokens.ids == ids
    assert tokens == conversation_ids(tokenizer, messages, CHATML)
    # The reference also supervises the line break behind each end token, which is never decoded.
    starts = [turn.prompt_end for turn in tokens.turns]
    ends = [turn.end + 1 for turn in tokens.turns]
    assert starts == [i for i, mark in enumerate(supervised) if mark and not supervised[i - 1]]
    assert ends == [i for i in range(1, len(ids) + 1) if supervised[i - 1] and not [*supervised, False][i]]
