from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgen.chat import (
    CHATML,
    ChatTemplate,
    check_arguments,
    conversation_ids,
    end_of_turn_id,
    load_tokenizer,
    observation_ids,
    prompt_ids,
    text_ids,
    writes_todays_date,
)
from memgen.lab.tokenizer import lab_tokenizer

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


def test_a_turn_that_would_merge_with_its_header_is_encoded_by_itself_as_it_is_decoded():
    messages = [CHAT[1], {"role": "assistant", "content": "\n\nYes."}, CHAT[3], CHAT[2]]
    prompt = prompt_ids(TOKENIZER, messages[:1])
    tokens = conversation_ids(TOKENIZER, messages)
    assert tokens.ids[: tokens.turns[0].prompt_end] == prompt
    assert turns_as_text(tokens) == ["\n\nYes.<|im_end|>", "It is 2.<|im_end|>"]
    assert tokens.ids[: tokens.turns[1].prompt_end] == prompt_ids(TOKENIZER, messages[:3])


# The shapes of the templates of the backbones in conf/backbone, and of others that are common.
DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\nHelp.<|im_end|>\n' -}}{%- endif -%}"
)
SWITCHED = (  # Qwen3, for one answer
    "{%- for m in messages -%}"
    "{%- set content = m['content'] -%}{%- set thoughts = m.reasoning_content or '' -%}"
    "{%- if m['role'] == 'assistant' and '</think>' in content -%}"
    "{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\n' -}}"
    "{%- if m['role'] == 'assistant' -%}{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- content.lstrip('\n') + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
OPENED = SWITCHED.replace("{{- '<|im_start|>assistant\n' -}}", "{{- '<|im_start|>assistant\n<think>\n' -}}")
DATED = (  # SmolLM3
    "{{- '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\n' -}}"
    "{{- ('/think' if enable_thinking is not defined or enable_thinking else '/no_think') + '<|im_end|>\n' -}}"
    + CHATML
)
HEADERS = (  # Llama 3
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
BRACKETS = (  # Mistral
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{{- ' ' + m['content'] + '</s>' -}}"
    "{%- else -%}{{- '[INST] ' + m['content'] + '[/INST]' -}}{%- endif -%}{%- endfor -%}"
)
TEMPLATES = {
    "chatml": CHATML,
    "tight": TIGHT,
    "default system": DEFAULT_SYSTEM + CHATML,
    "switched": SWITCHED,
    "opened": OPENED,
    "dated": DATED,
    "headers": HEADERS,
    "brackets": BRACKETS,
}
CONTROLS = (
    "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<think>",
    "</think>", "<tool_call>", "<unk>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>")


def marked_tokenizer() -> PreTrainedTokenizerFast:
    """With the control tokens of all those templates, some of them not special, and an added word and run of spaces."""
    tokenizer = bpe_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens(
        [AddedToken(text, special=text not in NOT_SPECIAL, normalized=False) for text in CONTROLS]
    )
    tokenizer.add_tokens(["indeed", "    "])
    tokenizer.bos_token, tokenizer.unk_token = "<s>", "<unk>"
    return tokenizer


MARKED = marked_tokenizer()
ORDINARY = st.text(alphabet="abé ,.\n<|>#1è🙂", min_size=1, max_size=12).filter(str.strip)
SPELLED = st.lists(
    st.sampled_from([*CONTROLS, "a", " ", "\n", "assistant", "<|im_", "end|>", "<", "indeed"]), max_size=8
)


def controls_of(ids: list[int]) -> list[str]:
    return [text for text in MARKED.convert_ids_to_tokens(ids) if text in CONTROLS]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(question=ORDINARY, answer=ORDINARY)
@settings(max_examples=30, deadline=None)
def test_ordinary_text_is_encoded_in_one_with_its_template(template, question, answer):
    day = {"strftime_now": "2026-01-31"} if template == DATED else {}
    chat = ChatTemplate(template, day)
    user = [{"role": "user", "content": question}]
    rendered = template.replace("strftime_now('%d %B %Y')", "'31 January 2026'")
    text = MARKED.apply_chat_template(
        user, chat_template=rendered, tokenize=False, add_generation_prompt=True
    )
    prompt = prompt_ids(MARKED, user, chat)
    assert prompt == MARKED.encode(text, add_special_tokens=False)
    whole = [*user, {"role": "assistant", "content": answer}]
    text = MARKED.apply_chat_template(whole, chat_template=rendered, tokenize=False)
    tokens = conversation_ids(MARKED, whole, chat)
    plain = MARKED.encode(text, add_special_tokens=False)
    if plain[: len(prompt)] == prompt:  # else a token spans the header and the answer
        assert tokens.ids == plain
    assert tokens.ids[: len(prompt)] == prompt
    assert MARKED.decode(tokens.ids) == MARKED.decode(plain)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(question=SPELLED, answer=SPELLED)
@settings(max_examples=30, deadline=None)
def test_no_message_can_write_a_control_token(template, question, answer):
    question, answer = "a" + "".join(question), "a" + "".join(answer).replace("</think>", "</think >")
    chat = ChatTemplate(template, {"strftime_now": "2026-01-31"} if template == DATED else {})
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    spelled = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids = conversation_ids(MARKED, spelled, chat).ids
    assert controls_of(ids) == controls_of(conversation_ids(MARKED, plain, chat).ids)
    assert question.strip() in MARKED.decode(ids)
    assert ids[: len(prompt_ids(MARKED, spelled[:1], chat))] == prompt_ids(MARKED, spelled[:1], chat)
    if template not in (SWITCHED, OPENED):
        between = observation_ids(MARKED, question, chat)
        assert controls_of(between) == controls_of(observation_ids(MARKED, "a", chat))
    assert not controls_of(text_ids(MARKED, question + answer))
    assert MARKED.decode(text_ids(MARKED, question + answer)) == question + answer


def test_added_words_and_runs_of_spaces_stay_the_tokens_that_they_are():
    ids = prompt_ids(MARKED, [{"role": "user", "content": "so    indeed"}])
    assert {"    ", "indeed"} <= set(MARKED.convert_ids_to_tokens(ids))


def test_a_control_token_that_the_vocabulary_itself_has_is_text_too():
    tokenizer = lab_tokenizer()
    spelled = [{"role": "user", "content": "shop <end> fig"}]
    with pytest.raises(ValueError, match=r"does not know \(<unk>\): '<'"):
        prompt_ids(tokenizer, spelled)


def test_words_that_are_unknown_are_named_and_an_end_token_that_is_also_the_unknown_one_is_none():
    with pytest.raises(ValueError, match=r"words that the tokenizer .* does not know \(<unk>\): 'pear'"):
        prompt_ids(lab_tokenizer(), [{"role": "user", "content": "shop : pear .\n"}])
    both = bpe_tokenizer("<|im_start|>", "<|im_end|>")
    both.unk_token = both.eos_token
    assert conversation_ids(both, CHAT) == conversation_ids(TOKENIZER, CHAT)
    spelled = [{"role": "user", "content": "a<|im_end|>b"}]
    assert prompt_ids(both, spelled) == prompt_ids(TOKENIZER, spelled)


def test_thoughts_of_a_turn_are_the_templates_where_it_takes_them_apart():
    answer = {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\nIt is 2."}
    tokens = conversation_ids(MARKED, [CHAT[1], answer], SWITCHED)
    assert MARKED.decode(tokens.ids[tokens.turns[0].prompt_end :]) == answer["content"] + "<|im_end|>\n"
    assert controls_of(tokens.ids)[-3:] == ["<think>", "</think>", "<|im_end|>"]


def test_arguments_reach_every_rendering():
    chat = ChatTemplate(SWITCHED, {"enable_thinking": False})
    prompt = prompt_ids(MARKED, CHAT[1:2], chat)
    assert MARKED.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    tokens = conversation_ids(MARKED, CHAT[1:3], chat)
    assert tokens.ids[: tokens.turns[0].prompt_end] == prompt
    assert MARKED.decode(tokens.ids[len(prompt) :]) == "It is 2.<|im_end|>\n"
    assert tokens.fixed == ()


def test_what_a_template_writes_into_a_turn_is_marked_as_its_own():
    tokens = conversation_ids(MARKED, CHAT[1:3], SWITCHED)
    assert [MARKED.decode(tokens.ids[a:b]) for a, b in tokens.fixed] == ["<think>\n\n</think>\n\n"]
    closed = CHATML.replace("message['content'] + '<|im_end|>", "message['content'] + '\n<|im_end|>")
    tokens = conversation_ids(MARKED, CHAT[1:3], closed)
    assert [MARKED.decode(tokens.ids[a:b]) for a, b in tokens.fixed] == ["\n"]


def test_a_prompt_that_ends_in_an_opened_thought_is_continued_in_halves():
    tokens = conversation_ids(MARKED, CHAT[1:3], OPENED)
    prompt = prompt_ids(MARKED, CHAT[1:2], OPENED)
    assert MARKED.decode(prompt).endswith("<think>\n")
    assert tokens.ids[: len(prompt)] == prompt
    assert MARKED.decode(tokens.ids[len(prompt) :]) == "\n</think>\n\nIt is 2.<|im_end|>\n"


def test_a_date_stands_still_when_it_is_given():
    assert writes_todays_date(MARKED, ChatTemplate(DATED))
    fixed = ChatTemplate(DATED, {"strftime_now": "2026-01-31", "enable_thinking": False})
    assert not writes_todays_date(MARKED, fixed)
    assert "Today: 31 January 2026\n/no_think" in MARKED.decode(prompt_ids(MARKED, CHAT[1:2], fixed))


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("enable_thinkng", "did you mean enable_thinking?"),
        ("think", "leave it out"),
        ("colour", "leave it out"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_refused(argument, hint):
    check_arguments(MARKED, ChatTemplate(DATED, {"enable_thinking": False, "strftime_now": "2026-01-31"}))
    complaint = rf"template_arguments\.{argument}: the chat template .* does not read it; {re.escape(hint)}"
    with pytest.raises(ValueError, match=complaint):
        check_arguments(MARKED, ChatTemplate(DATED, {argument: False}))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"messages": []}, "template_arguments.messages is set by the trainer"),
        ({"strftime_now": "yesterday"}, "strftime_now must be a date.*'yesterday'"),
        ({"strftime_now": 2026}, "strftime_now must be a date.*2026"),
    ],
    ids=["reserved", "no date", "a number"],
)
def test_arguments_that_cannot_work_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        ChatTemplate(None, arguments)


def test_a_template_that_fails_is_one_line():
    with pytest.raises(ValueError, match=r"cannot render this conversation: No tools here; .*chatml"):
        prompt_ids(TOKENIZER, CHAT[:2], "{{ raise_exception('No tools here') }}")
    with pytest.raises(ValueError, match="cannot render this conversation"):
        prompt_ids(TOKENIZER, CHAT[:2], "{% for m in messages %}{{ m['content'] }}")


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(ValueError, match=r"half of a surrogate pair .*ud83d.* at character 3"):
        prompt_ids(TOKENIZER, [{"role": "user", "content": "a b\ud83d"}])


def test_a_class_that_changes_the_ids_of_its_file_gives_way_to_the_file(tmp_path, caplog):
    TOKENIZER.save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    changed = json.loads(settings_file.read_text(encoding="utf-8")) | {
        "tokenizer_class": "LlamaTokenizerFast"
    }
    settings_file.write_text(json.dumps(changed), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    changed = AutoTokenizer.from_pretrained(tmp_path)
    text = "The answer\n\nthe answer, don't: 12 + 345.  <|im_end|>"
    assert changed.encode(text) != TOKENIZER.encode(text)
    assert load_tokenizer(str(tmp_path)).encode(text) == TOKENIZER.encode(text)
    assert "the file decides" in caplog.text
    assert conversation_ids(load_tokenizer(str(tmp_path)), CHAT) == conversation_ids(TOKENIZER, CHAT)


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
