r"""Messages to token ids, and which of these ids the assistant wrote.

A tokenizer's own chat template is used if it has one, else ChatML. An assistant's turn runs from the first token
after its header to its end-of-turn token inclusive. Only the template writes control tokens: where the text of a message
spells one (`<|im_end|>`, `</s>`), it is encoded in two halves, as ordinary text. Differs from the released code: (1) the
line break that ChatML puts after `<|im_end|>` is no target, since decoding stops at `<|im_end|>`; (2) turns are located
by rendering the conversation up to them, never by searching for header ids or padding ids; (3) the tokenizer's own
template is used, not overwritten.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from memgen.environments.base import Message

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + ('user' if message['role'] == 'tool' else message['role']) + '\n' -}}"
    "{{- message['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""ChatML as a template; a tool's message is shown as a user's."""

log = logging.getLogger(__name__)

_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_CLOCK = "strftime_now"
_PROBE: tuple[Message, ...] = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})
_RESERVED = ("messages", "conversation", "chat_template", "tokenize", "add_generation_prompt")
_SAMPLES = (
    "Hello world, it's 1,234,567.89 dollars!  Two spaces,\ttabs\n\n\nand   lines\r\n    def f(x):\n        return x**2\n",
    " leading and trailing ",
    "\nWE'LL don't; camelCase_snake-case/path.py?x=1&y=2 \\frac{1}{2} $x^{10}$ <b>#@%</b>",
    "caf\u00e9 cafe\u0301 na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \u0434\u0430 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f600 \u00bd\u00a0\ufb01 \u2581 \uff21",
)
"""Texts on which a tokenizer's class is compared with its file: digits, cases, white space, marks, scripts."""


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become one text."""

    text: str | None = None
    """The template (Jinja), `CHATML` for instance; None: the tokenizer's if it has one, else ChatML."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Values for the template's variables in every rendering, `enable_thinking` for instance. `strftime_now` as a date
    ("2026-01-31") is what templates that write today's date take for today."""

    def __post_init__(self) -> None:
        reserved = [name for name in self.arguments if name in _RESERVED]
        if reserved:
            raise ValueError(
                f"data.template_arguments.{reserved[0]} is set by the trainer itself; leave it out"
            )
        day = self.arguments.get(_CLOCK, "2026-01-31")
        try:
            datetime.fromisoformat(day)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f'data.template_arguments.{_CLOCK} must be a date such as "2026-01-31", got {day!r}'
            ) from error

    def record(self) -> dict[str, Any]:
        """Plain values for a file; `ChatTemplate(**record)` gives the template back."""
        return {"text": self.text, "arguments": dict(self.arguments)}


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
        fixed: spans of tokens inside the turns that the template writes whatever the message says (an empty think
            block, for instance), in order: no boundary lies behind them.
    """

    ids: list[int]
    turns: tuple[TurnSpan, ...]
    fixed: tuple[tuple[int, int], ...] = ()


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
        wrong = _differs_from_its_file(tokenizer, name, revision)
        if wrong is not None:
            log.warning("tokenizer %s: %s; the file decides", name, wrong)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, revision=revision)
            wrong = _differs_from_its_file(tokenizer, name, revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        place = (
            "cannot be read"
            if Path(name).is_dir()
            else "is no directory and could not be loaded from the hub"
        )
        raise FileNotFoundError(f"tokenizer {name!r} {place}: {reason}") from error
    if wrong is not None:
        raise ValueError(f"tokenizer {name!r}: {wrong}; remove what tokenizer_config.json changes")
    assert isinstance(tokenizer, PreTrainedTokenizerBase), "AutoTokenizer gives a tokenizer"
    return tokenizer


def _differs_from_its_file(tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> str | None:
    """How a tokenizer splits a sample otherwise than its tokenizer.json, which its class may change; None: it does not."""
    file = cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    core = Tokenizer.from_file(file)
    core.no_truncation()
    core.no_padding()
    added = [token.content for token in core.get_added_tokens_decoder().values()]
    for text in (*_SAMPLES, *added):
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        theirs = core.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))
            return (
                f"the class {type(tokenizer).__name__} reads {text[:20]!r} as {ours[same : same + 4]} from token {same} on, "
                f"its tokenizer.json as {theirs[same : same + 4]}"
            )
    return None


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | str | None = None,
) -> list[int]:
    """Token ids of a prompt: the messages and the header of the assistant's next turn.

    Args:
        tokenizer: any tokenizer with a tokenizer.json.
        messages: at least one, not all of them blank.
        template: in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if the prompt is empty or has unknown words, or the tokenizer can render no chat.
    """
    _require_prompt(messages, "the prompt")
    chat = _Chat(tokenizer, messages, template, header=True)
    chat.require_known()
    return chat.all_ids


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: ChatTemplate | str | None = None,
) -> ConversationTokens:
    """Token ids of a conversation, with the spans of the assistant's turns.

    The conversation is tokenised as a whole; each turn is located by the tokens of the conversation before it, so
    every prompt is, token for token, what `prompt_ids` gives when decoding. A turn whose beginning would merge with its
    header into one token is tokenised by itself, as it is decoded.

    Args:
        tokenizer: any tokenizer with a tokenizer.json.
        messages: a conversation with at least one assistant message; what follows the last one is kept in `ids`.
        template: in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if a prompt or an assistant's message is empty, if there is no assistant message, if there are
            unknown words, or if the template rewrites earlier messages or has no end-of-turn token.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no assistant message, so nothing in it can be supervised")
    for index in turns:
        if not messages[index]["content"].strip():
            raise ValueError(f"message {index} (assistant) is empty; every assistant message needs a text")
        _require_prompt(messages[:index], f"the prompt of message {index} (assistant)")
    chat = _Chat(tokenizer, messages, template, header=False)
    chat.require_known()
    return _conversation(chat, turns)


def _conversation(chat: _Chat, turns: Sequence[int]) -> ConversationTokens:
    """The tokens of a conversation, given the indices of the assistant's messages."""
    ids = chat.all_ids
    spans: list[TurnSpan] = []
    fixed: list[tuple[int, int]] = []
    for index in turns:
        what = f"message {index} (assistant)"
        until = chat.text if index + 1 == chat.count else chat.render(index + 1, header=False)
        before = chat.headers.get(index)
        if before is None or not (until.startswith(before) and chat.text.startswith(until)):
            raise ValueError(
                f"the chat template renders {what} differently when more messages follow, or without the header "
                "that decoding starts from, so its tokens cannot be located; give another template "
                "(data.chat_template: chatml)"
            )
        start, until_ids = chat.starts[index], chat.ids(until)
        if ids[: len(until_ids)] != until_ids:
            raise ValueError(
                f"the tokenizer merges the end of {what} with what follows it, so its tokens cannot be located; give "
                "another template (data.chat_template: chatml)"
            )
        spans.append(TurnSpan(start, _turn_end(chat.tokenizer, ids, start, len(until_ids), what)))
        fixed += chat.fixed(index, until, spans[-1])
    return ConversationTokens(ids=ids, turns=tuple(spans), fixed=tuple(fixed))


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, controls: bool = False) -> list[int]:
    """Token ids of a text without a chat template.

    Args:
        tokenizer: any tokenizer with a tokenizer.json.
        text: any.
        controls: whether control tokens that it spells are control tokens; False: they are ordinary text.

    Raises:
        ValueError: if it has words that the tokenizer does not know.
    """
    pieces = [text] if controls else _without_controls(tokenizer, text)
    encodings = [_encoding(tokenizer, piece) for piece in pieces if piece]
    for piece, encoding in zip(filter(None, pieces), encodings, strict=True):
        _require_known(tokenizer, piece, encoding)
    return [token for encoding in encodings for token in encoding.ids]


def byte_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The characters of a text that the tokenizer knows as bytes alone, once for each token that is a part of one.

    Raises:
        ValueError: if the text cannot be encoded.
    """
    encoding = _encoding(tokenizer, text)
    return [
        text[start:end].strip()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if "\ufffd" in tokenizer.decode([token]) and "\ufffd" not in text[start:end]
    ]


def template_text(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """The template in Jinja that conversations are rendered with."""
    return template.text or (str(tokenizer.get_chat_template()) if tokenizer.chat_template else CHATML)


def check_arguments(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
    """Checks that the template reads its arguments.

    Raises:
        ValueError: if it does not read one.
    """
    words = {value for _, kind, value in Environment().lex(_source(tokenizer, template)) if kind == "name"}
    for name in template.arguments:
        if name not in words and name != _CLOCK:
            guess = difflib.get_close_matches(name, words, n=1)
            hint = f"did you mean {guess[0]}?" if guess else "leave it out"
            raise ValueError(
                f"data.template_arguments.{name}: the chat template of {tokenizer.name_or_path} does not read it; {hint}"
            )


def writes_todays_date(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> bool:
    """Whether prompts depend on the day on which they are rendered."""
    if _CLOCK in template.arguments or _CLOCK not in _source(tokenizer, template):
        return False
    days = [
        dataclasses.replace(template, arguments={**template.arguments, _CLOCK: day})
        for day in ("2001-01-01", "2022-12-12")
    ]
    first, second = (_Chat(tokenizer, _PROBE, day, header=False).text for day in days)
    return first != second


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | str | None = None) -> int:
    """The token that closes an assistant's turn: decoding stops at it.

    Raises:
        ValueError: if the template closes a turn without a special token.
    """
    tokens = _conversation(_Chat(tokenizer, _PROBE, template, header=False), [1])
    return tokens.ids[tokens.turns[0].end - 1]


def observation_ids(
    tokenizer: PreTrainedTokenizerBase, observation: str, template: ChatTemplate | str | None = None
) -> list[int]:
    """Token ids between two turns of an agent: what follows its end-of-turn token, up to its next turn.

    The agent's own tokens are never decoded and encoded again: the context keeps the sampled tokens.

    Args:
        tokenizer: any tokenizer.
        observation: the environment's text; becomes a user message.
        template: a chat template in place of the tokenizer's (`CHATML`, for instance).

    Raises:
        ValueError: if the observation is empty or has unknown words, or the template renders a turn differently when a message follows.
    """
    if not observation.strip():
        raise ValueError("an observation is empty; the environment must answer an action with a text")
    text_ids(tokenizer, observation)  # refuses unknown words
    turn = _conversation(_Chat(tokenizer, _PROBE, template, header=False), [1])
    longer: list[Message] = [*_PROBE, {"role": "user", "content": observation}]
    ids = _Chat(tokenizer, longer, template, header=True).all_ids
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


class _Chat:
    """A conversation while it is rendered and tokenised.

    Attributes:
        text: the whole, with `mark` inside each control token that a message spells.
        headers: for each assistant's message the text before it, its header included, where it begins `text`.
        starts: tokens of each header.
        all_ids: token ids of `text`.
        count: number of messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        template: ChatTemplate | str | None,
        *,
        header: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template if isinstance(template, ChatTemplate) else ChatTemplate(template)
        self._source = _source(tokenizer, self._template)
        texts = "".join([self._source, *(message["content"] for message in messages)])
        # Two characters of a private-use area that occur nowhere else.
        self.count = len(messages)
        self._mark, self._hole = itertools.islice(
            (c for c in map(chr, range(0xE000, 0xF900)) if c not in texts), 2
        )
        self._messages = [self._prepared(message) for message in messages]
        self._cuts: list[int] = []
        self.text = self.render(len(messages), header=header)
        self.headers: dict[int, str] = {}
        self.starts: dict[int, int] = {}
        self.all_ids = self.ids(self.text)
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or not any(m["content"].strip() for m in messages[:index]):
                continue
            before = self.render(index, header=True)
            if not self.text.startswith(before):
                continue
            self.headers[index] = before
            prefix = self.ids(before)
            self.starts[index] = len(prefix)
            if self.all_ids[: len(prefix)] != prefix:
                # The last character of the header and the first of the turn would be one token.
                self._cuts.append(len(before))
                self.all_ids = self.ids(self.text)

    def render(self, count: int, *, header: bool) -> str:
        """The text of the first messages."""
        return self._rendered(self._messages[:count], header=header)

    def ids(self, text: str) -> list[int]:
        """Token ids of a beginning of `text`."""
        return [token for _, encoding in self._encodings(text) for token in encoding.ids]

    def require_known(self) -> None:
        """Checks the words of `text`.

        Raises:
            ValueError: if the tokenizer does not know some.
        """
        for place, encoding in self._encodings(self.text):
            _require_known(self.tokenizer, self.text[place:], encoding)

    def _encodings(self, text: str) -> Iterator[tuple[int, Encoding]]:
        """The parts of a beginning of `text` that are encoded by themselves, each behind its first character's index."""
        for begin, end in pairwise([0, *(cut for cut in self._cuts if cut < len(text)), len(text)]):
            for piece in text[begin:end].split(self._mark):
                if piece:
                    yield begin, _encoding(self.tokenizer, piece)
                begin += len(piece) + len(self._mark)

    def _tokens_before(self, place: int) -> int:
        """How many tokens of `all_ids` end at a character of `text` or before it."""
        ends = (first + end for first, encoding in self._encodings(self.text) for _, end in encoding.offsets)
        return sum(1 for _ in takewhile(lambda end: end <= place, ends))

    def fixed(self, index: int, until: str, turn: TurnSpan) -> list[tuple[int, int]]:
        """Spans of the tokens of a turn that are the template's, whatever the message says."""
        before = self.headers[index]
        empty = {name: self._hole if name != "role" else text for name, text in self._messages[index].items()}
        probe = self._rendered([*self._messages[:index], empty], header=False)
        if not probe.startswith(before) or self._hole not in probe:
            return []
        first = probe[: probe.index(self._hole)]
        last = probe[probe.rindex(self._hole) + 1 :]
        begin, end = turn.prompt_end, turn.end - 1
        if len(first) > len(before) and until.startswith(first):
            begin = self._tokens_before(len(first))
        closing = self.tokenizer.convert_ids_to_tokens(self.all_ids[end])
        if until.endswith(last) and not last.startswith(str(closing)):
            end = min(end, self._tokens_before(len(until) - len(last)))
        spans = [(turn.prompt_end, begin), (max(begin, end), turn.end - 1)]
        return [(start, stop) for start, stop in spans if start < stop]

    def _prepared(self, message: Message) -> dict[str, str]:
        """A message for the template: control tokens marked, and thoughts apart where the template takes them apart."""
        fields: dict[str, str] = {"role": message["role"], "content": message["content"]}
        if message["role"] == "assistant" and "reasoning_content" in self._source:
            thoughts, close, answer = message["content"].partition("</think>")
            if close:
                fields["content"] = answer.lstrip("\n")
                fields["reasoning_content"] = thoughts.split("<think>")[-1].strip("\n")
        return {
            name: text if name == "role" else self._mark.join(_without_controls(self.tokenizer, text))
            for name, text in fields.items()
        }

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, header: bool) -> str:
        arguments = {name: value for name, value in self._template.arguments.items() if name != _CLOCK}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=header,
                **arguments,
            )
        except (TemplateError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"the chat template cannot render this conversation: {reason}; give another template "
                "(data.chat_template: chatml)"
            ) from error
        return str(text)


def _source(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> str:
    """The text of the template that renders, with a given date in place of today's.

    Raises:
        ValueError: if it is ChatML and the tokenizer lacks its tokens.
    """
    source = template_text(tokenizer, template)
    if source == CHATML:
        vocabulary = tokenizer.get_added_vocab()
        missing = [token for token in _CHATML_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"ChatML needs the special tokens {' and '.join(missing)}, which the tokenizer "
                f"{tokenizer.name_or_path or type(tokenizer).__name__} does not have; use a tokenizer with a chat "
                "template, or add the tokens to it"
            )
    day = template.arguments.get(_CLOCK)
    if day is None:
        return source
    # The library takes no functions as arguments, so the date is written into the template.
    clock = datetime.fromisoformat(day)
    return re.sub(rf"{_CLOCK}\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(clock.strftime(call[2])), source)


def _require_known(tokenizer: PreTrainedTokenizerBase, text: str, encoding: Encoding) -> None:
    """Checks a text's words.

    Raises:
        ValueError: if the tokenizer does not know some.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in encoding.ids:
        return
    # The unknown token may also be the end token (OLMo-2), which the template writes.
    words = [
        text[start:end]
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if token == unknown and text[start:end].strip() != tokenizer.unk_token
    ]
    if words:
        named = ", ".join(repr(word) for word in list(dict.fromkeys(words))[:5])
        raise ValueError(
            f"its text has words that the tokenizer {tokenizer.name_or_path} does not know ({tokenizer.unk_token}): {named}; "
            "text and backbone do not belong together (data.tokenizer, model.memgen.backbone.name)"
        )


def _encoding(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    try:
        # The template writes every special token itself.
        encodings = tokenizer(text, add_special_tokens=False, verbose=False).encodings
    except (TypeError, UnicodeEncodeError) as error:
        half = next((index for index, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
        if half is None:
            raise
        raise ValueError(
            f"the text has half of a surrogate pair ({text[half]!a}) at character {half}, which is no character; remove it"
        ) from error
    if not encodings:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no tokenizer.json; convert it to a fast one"
        )
    encoding: Encoding = encodings[0]
    return encoding


def _without_controls(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The text in pieces none of which has a control token: one that it spells is split behind its first character.

    Raises:
        ValueError: if a control token is one character.
    """
    if not text:
        return [text]
    control, unknown = _control_ids(tokenizer, len(tokenizer)), tokenizer.unk_token_id
    encoding = _encoding(tokenizer, text)
    cuts = []
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token not in control:
            continue
        spelled = text[start:end].strip()
        if not spelled or (token == unknown and spelled != tokenizer.unk_token):
            continue  # white space, or a word that is unknown
        if len(spelled) < 2:
            raise ValueError(
                f"the text has {spelled!r}, which is a control token of the tokenizer {tokenizer.name_or_path} and of one "
                "character, so it cannot be written as text; remove it"
            )
        # White space around a token may count as the token's.
        cuts.append(text.index(spelled, start) + 1)
    if not cuts:
        return [text]
    pieces = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    return [part for piece in pieces for part in _without_controls(tokenizer, piece)]


@lru_cache(maxsize=8)
def _control_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Ids that only a template may write. `size` is the tokenizer's: tokens may be added to it."""
    added = (
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or not _is_text(token.content)
    )
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def _is_text(added: str) -> bool:
    """Whether an added token is text: some tokenizers add words, single characters or runs of white space."""
    return len(added.strip()) < 2 or all(c.isalnum() or c.isspace() or c in "-_'.,\u2581" for c in added)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    # Some tokenizers add tokens that are not special, runs of spaces for instance.
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids) | frozenset(added)


def _turn_end(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    start: int,
    stop: int,
    what: str,
) -> int:
    """Index after the end-of-turn token of the turn in `ids[start:stop]`, which white space may follow."""
    specials = _special_ids(tokenizer)
    end = stop
    while end > start and ids[end - 1] not in specials and not tokenizer.decode([ids[end - 1]]).strip():
        end -= 1
    if end == start or ids[end - 1] not in specials:
        raise ValueError(
            f"the chat template closes {what} without a special token, so decoding could not stop at the end "
            "of a turn; give another template (data.chat_template: chatml)"
        )
    return end
