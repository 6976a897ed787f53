r"""Messages to token ids, and which of these ids the assistant wrote.

A tokenizer's own chat template is used if it has one, else ChatML. An assistant's turn runs from the first token
after its header to its end-of-turn token inclusive. Differs from the released code: (1) the line break that ChatML
puts after `<|im_end|>` is no target, since decoding stops at `<|im_end|>`; (2) turns are located by rendering
the conversation up to them, never by searching for header ids or padding ids; (3) the tokenizer's own template is
used, not overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from memgen.environments.base import Message

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\n' -}}"
    "{{- message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""ChatML as a template; a tool's message is shown as a user's."""

_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


class TurnSpan(NamedTuple):
    """An assistant's turn as a span of token indices."""

    prompt_end: int
    """Tokens before the turn, its header included."""
    end: int
    """Index after the turn's end-of-turn token."""


@dataclass(frozen=True)
class ConversationTokens:
    """A conversation as token ids.

    Attributes:
        ids: all token ids.
        turns: the assistant's turns, in order.
    """

    ids: list[int]
    turns: tuple[TurnSpan, ...]


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a directory or from the hub.

    Raises:
        FileNotFoundError: if it is in neither place, or the hub cannot be reached.
    """
    try:
        # AutoTokenizer takes the class of the model's architecture over the one that the tokenizer's own files name
        # (Qwen2's, for instance, with its own splitting and decoding); for a generic tokenizer the files decide.
        declared = get_tokenizer_config(name, revision=revision).get("tokenizer_class")
        loader = PreTrainedTokenizerFast if declared in _GENERIC_CLASSES else AutoTokenizer
        tokenizer = loader.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        place = (
            "cannot be read"
            if Path(name).is_dir()
            else "is no directory and could not be loaded from the hub"
        )
        raise FileNotFoundError(f"tokenizer {name!r} {place}: {reason}") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "AutoTokenizer gives a tokenizer"
    return tokenizer


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None = None
) -> list[int]:
    """Token ids of a prompt: the messages and the header of the assistant's next turn.

    Args:
        tokenizer: any tokenizer.
        messages: at least one, not all of them blank.
        template: a chat template in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if the prompt is empty, or the tokenizer can render no chat.
    """
    _require_prompt(messages, "the prompt")
    return _tokenize(tokenizer, _render(tokenizer, messages, template, header=True))


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None = None
) -> ConversationTokens:
    """Token ids of a conversation, with the spans of the assistant's turns.

    The conversation is tokenised as a whole; each turn is located by the tokens of the conversation before it,
    which must be a prefix of the whole: so every prompt is, token for token, what `prompt_ids` gives when decoding.

    Args:
        tokenizer: any tokenizer.
        messages: a conversation with at least one assistant message; what follows the last one is kept in `ids`.
        template: a chat template in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if a prompt or an assistant's message is empty, if there is no assistant message, or if the
            template has no such prefixes or no end-of-turn token.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no assistant message, so nothing in it can be supervised")
    whole = _render(tokenizer, messages, template, header=False)
    ids = _tokenize(tokenizer, whole)
    specials = _special_ids(tokenizer)
    spans = []
    for index in turns:
        what = f"message {index} (assistant)"
        if not messages[index]["content"].strip():
            raise ValueError(f"{what} is empty; every assistant message needs a text")
        _require_prompt(messages[:index], f"the prompt of {what}")
        before = _render(tokenizer, messages[:index], template, header=True)
        if index + 1 == len(messages):
            until, until_ids = whole, ids
        else:
            until = _render(tokenizer, messages[: index + 1], template, header=False)
            until_ids = _tokenize(tokenizer, until)
        if not (until.startswith(before) and whole.startswith(until)):
            raise ValueError(
                f"the chat template renders {what} differently when more messages follow, or without the header "
                "that decoding starts from, so its tokens cannot be located; give another template "
                "(data.chat_template: chatml)"
            )
        before_ids = _tokenize(tokenizer, before)
        start = len(before_ids)
        if ids[:start] != before_ids or ids[: len(until_ids)] != until_ids:
            raise ValueError(
                f"the tokenizer merges the header of {what} with its text, which begins with "
                f"{messages[index]['content'][:8]!r}, so decoding would start from other tokens; remove the white space "
                "there, or give another template (data.chat_template: chatml)"
            )
        spans.append(TurnSpan(start, _turn_end(tokenizer, ids, start, len(until_ids), specials, what)))
    return ConversationTokens(ids=ids, turns=tuple(spans))


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int:
    """The token that closes an assistant's turn: decoding stops at it.

    Raises:
        ValueError: if the template closes a turn without a special token.
    """
    probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    tokens = conversation_ids(tokenizer, probe, template)
    return tokens.ids[tokens.turns[0].end - 1]


def observation_ids(
    tokenizer: PreTrainedTokenizerBase, observation: str, template: str | None = None
) -> list[int]:
    """Token ids between two turns of an agent: what follows its end-of-turn token, up to its next turn.

    The agent's own tokens are never decoded and encoded again: the context keeps the sampled tokens.

    Args:
        tokenizer: any tokenizer.
        observation: the environment's text; becomes a user message.
        template: a chat template in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if the observation is empty, or the template renders a turn differently when a message follows.
    """
    if not observation.strip():
        raise ValueError("an observation is empty; the environment must answer an action with a text")
    probe: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    turn = conversation_ids(tokenizer, probe, template)
    longer: list[Message] = [*probe, {"role": "user", "content": observation}]
    ids = prompt_ids(tokenizer, longer, template)
    end = turn.turns[0].end
    if ids[:end] != turn.ids[:end]:
        raise ValueError(
            "the chat template renders an agent's turn differently when a message follows it, so an episode cannot "
            "go on from the tokens that the agent wrote; give another template (data.chat_template: chatml)"
        )
    return ids[end:]


def _require_prompt(messages: Sequence[Message], what: str) -> None:
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{what} is empty; it needs at least one message with a text")


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str | None, *, header: bool
) -> str:
    template = template or (None if tokenizer.chat_template else CHATML)
    if template == CHATML:
        vocabulary = tokenizer.get_added_vocab()
        missing = [token for token in _CHATML_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"ChatML needs the special tokens {' and '.join(missing)}, which the tokenizer "
                f"{tokenizer.name_or_path or type(tokenizer).__name__} does not have; use a tokenizer with a chat "
                "template, or add the tokens to it"
            )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=header,
    )
    return str(text)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes every special token itself.
    return list(tokenizer.encode(text, add_special_tokens=False))


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    # Some tokenizers add tokens that are not special, runs of spaces for instance.
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def _turn_end(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    start: int,
    stop: int,
    specials: frozenset[int],
    what: str,
) -> int:
    """Index after the end-of-turn token of the turn in `ids[start:stop]`, which white space may follow."""
    end = stop
    while end > start and ids[end - 1] not in specials and not tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    if end == start or ids[end - 1] not in specials:
        raise ValueError(
            f"the chat template closes {what} without a special token, so decoding could not stop at the end "
            "of a turn; give another template (data.chat_template: chatml)"
        )
    if ids[end - 1] in ids[start : end - 1]:
        token = tokenizer.convert_ids_to_tokens(ids[end - 1])
        raise ValueError(f"{what} contains the end-of-turn token {token} in its text; remove it")
    return end
