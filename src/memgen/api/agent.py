r"""An agent: a model with its tokenizer and chat template, loaded by name. Questions in, answers out.

    import memgen

    agent = memgen.load("runs/weaver_sft/latest/best")
    print(agent.generate("shop : fig , nut , tea .\n"))

`memgen generate` and `memgen serve` are this class with a command line and a server around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast, final

import torch

from memgen.api.card import CARD, Card
from memgen.api.hub import upload
from memgen.api.names import resolve_name
from memgen.api.text import AnswerText
from memgen.chat import (
    CHATML,
    ChatTemplate,
    check_arguments,
    end_of_turn_id,
    load_tokenizer,
    prompt_ids,
    text_ids,
)
from memgen.environments.base import Message
from memgen.files import current
from memgen.generation.continuous import ContinuousBatch, Newcomer
from memgen.generation.decode import generate
from memgen.generation.latent_bank import bank_to_write
from memgen.generation.sampling import GenerationSettings
from memgen.lab.assets import resolve_asset
from memgen.memories.latent_bank import Kept
from memgen.model.backbone import BackboneConfig
from memgen.model.external import BankSettings, RetrievalSettings
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.parsing import parse
from memgen.seeds import episode_seeds
from memgen.training.checkpoint import (
    CONFIG_FILE,
    TRIGGER_FILE,
    TextSettings,
    open_checkpoint,
    read_config,
    read_text_settings,
    save_checkpoint,
)
from memgen.types import AgentTurn, InsertionKind, InsertionPlan, RowWork, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Question = str | Sequence[Message]
"""What is answered: a user's message, or the messages of a conversation."""
Template = Literal["checkpoint", "tokenizer", "chatml"]
"""Which chat template renders a question."""
Recorded = Literal["checkpoint"]
"""What the checkpoint says."""
MARK = "⟦memory⟧"
"""What an insertion looks like as text."""


@dataclass(frozen=True)
class Insertion:
    """A place in an answer where latents were woven in. As a string it is a mark, so that it can be printed.

    Attributes:
        token: the index in the answer's tokens before which the latents lie; 0: at the end of the prompt.
        character: likewise in its text.
        latents: how many, K.
    """

    token: int
    character: int
    latents: int

    def __str__(self) -> str:
        return MARK


@dataclass(frozen=True)
class Answer:
    """An answer. As a string it is its text.

    Attributes:
        text: what was written, without special tokens, up to the first stop text.
        tokens: token ids that were written, the end token included.
        logprobs: log-probability of each (see `AgentTurn.logprobs`).
        insertions: where latents were woven in, in order.
        work: positions that reasoner, weaver and trigger read for it.
        finished: True if it ended with an end token or a stop text, False if it was truncated at its limit.
        prompt_tokens: tokens of the prompt.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    insertions: tuple[Insertion, ...]
    work: RowWork
    finished: bool
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text

    def marked(self, mark: str = MARK) -> str:
        """The text with a mark at each insertion."""
        pieces, begin = [], 0
        for insertion in self.insertions:
            pieces += [self.text[begin : insertion.character], mark]
            begin = insertion.character
        return "".join([*pieces, self.text[begin:]])


@final
class Agent:
    """A model with its tokenizer and chat template.

    Args:
        model: in evaluation mode.
        config: its configuration.
        tokenizer: the reasoner's.
        text: how text became tokens when it was trained; None: not known.
        source: the checkpoint's folder; None: it has none.
        template: renders questions; None: that of `text`.
    """

    def __init__(
        self,
        model: MemGenModel,
        config: MemGenConfig,
        tokenizer: PreTrainedTokenizerBase,
        text: TextSettings | None = None,
        source: Path | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.model, self.config, self.tokenizer, self.source = model, config, tokenizer, source
        self._text = text
        # A template of the caller's closes a turn with a token that the checkpoint does not know of.
        self._ends_known = template is None and text is not None
        known = ChatTemplate() if text is None else ChatTemplate(text.chat_template, text.template_arguments)
        self.template = template or known

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        chat_template: Template = "checkpoint",
        template_arguments: Mapping[str, Any] | None = None,
        retrieval: RetrievalSettings | Mapping[str, Any] | Recorded | None = "checkpoint",
        bank: BankSettings | Mapping[str, Any] | Recorded | None = "checkpoint",
    ) -> Agent:
        """Loads a checkpoint and the base that it names.

        Args:
            name: a checkpoint's folder, or a run's (its best checkpoint, else its last); `hf://ORG/NAME[@REVISION]`;
                `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/ID` of MLflow; an asset such as `lab:weaver_sft`.
            device: cpu, cuda, cuda:1, ...; None: the CPU.
            chat_template: the checkpoint's own, the tokenizer's, or ChatML.
            template_arguments: values for the template's variables in place of the checkpoint's.
            retrieval: passages that the weaver reads (`model.memgen.weaver.retrieval`), as in the checkpoint, or others;
                None: none.
            bank: the latent bank that it reads (`model.memgen.weaver.bank`), likewise.

        Raises:
            ValueError: if there is no such checkpoint, it does not fit its base, or the template does not read an argument.
            ConnectionError: if the hub or MLflow does not answer.
        """
        folder = _checkpoint_in(Path(resolve_name(str(name))))
        config = read_config(folder)
        tokenizer = load_tokenizer(resolve_asset(config.backbone.name), config.backbone.revision)
        external = _external(retrieval=(RetrievalSettings, retrieval), bank=(BankSettings, bank))
        model, config = open_checkpoint(folder, load_tokenizer, resolve_asset, external)
        if device is not None:
            model.to(device)
        text = read_text_settings(folder)
        arguments = template_arguments
        if arguments is None:
            arguments = {} if text is None else text.template_arguments
        template = None
        if chat_template == "checkpoint" and text is not None:
            text = replace(text, template_arguments=dict(arguments))
        else:  # A checkpoint that does not say: the tokenizer's own.
            template = ChatTemplate(CHATML if chat_template == "chatml" else None, arguments)
        agent = cls(model, config, tokenizer, text, folder, template)
        if template_arguments:
            check_arguments(tokenizer, agent.template)
        return agent

    # Answers

    def generate(
        self,
        questions: Question | Sequence[Question],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
        batch_size: int = 32,
    ) -> Any:
        """Answers a question, or each of a list of questions.

        Args:
            questions: a question (a text, or the messages of a conversation), or a list of questions.
            max_new_tokens: limit of an answer's length.
            temperature: 0 takes the most probable token.
            top_p: sample from the smallest set of tokens that holds this probability; 1: off.
            top_k: sample from this many most probable tokens; 0: off.
            seed: of sampling; what is sampled for a question depends on it and on the question's place in the list.
            stop: texts that end an answer; it ends before them.
            raw: the question is the prompt as it is, without chat template, and control tokens that it spells count.
            batch_size: how many questions of a list are answered at the same time.

        Returns:
            An `Answer`, or for a list a list of them, in the order of the questions.

        Raises:
            ValueError: if a question is empty, has words that the tokenizer does not know, or does not fit into the
                reasoner's context.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        stop = _stop_texts(stop)
        single = is_question(questions)
        prompts = [self.prompt(q, raw=raw) for q in ([questions] if single else questions)]  # type: ignore[arg-type]
        seeds = episode_seeds(seed, range(len(prompts)))
        answers: list[Answer] = []
        for begin in range(0, len(prompts), batch_size):
            part = slice(begin, begin + batch_size)
            found = generate(
                self.model, prompts[part], settings, row_seeds=seeds[part], stop=self.stops(stop)
            )
            answers += [self.answer(turn, stop) for turn in found.turns]
        return answers[0] if single else answers

    def stream(
        self,
        question: Question,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Generator[str | Insertion, None, Answer]:
        """As `generate` of one question, piece by piece: texts, and an `Insertion` where latents are woven in.

        Leaving the loop ends the answer. The generator's return value is the whole answer.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        stop = _stop_texts(stop)
        prompt, row_seed = self.prompt(question, raw=raw), episode_seeds(seed, [0])[0]
        text, count = AnswerText(self.tokenizer, stop), 0
        batch = ContinuousBatch(self.model, 1)
        (place,) = batch.join([Newcomer(prompt, settings, row_seed, self.stops(stop))])
        while True:
            written = batch.written(place)
            for number in range(count, len(written.tokens)):
                if number in written.insertions:
                    yield Insertion(number, len(text.given), self.latents_before(number))
                if piece := text.add(written.tokens[number]):
                    yield piece
            count = len(written.tokens)
            if left := batch.leave():
                break
            batch.step()
        if piece := text.end():
            yield piece
        return self.answer(left[0][1], stop)

    def prompt(self, question: Question, *, raw: bool = False) -> list[int]:
        """The token ids that the reasoner reads of a question.

        Raises:
            ValueError: if it is empty, is no text and no list of messages, or has words that the tokenizer does not know.
        """
        if raw:
            if not isinstance(question, str):
                raise ValueError("with raw a question is a text, not a list of messages")
            return text_ids(self.tokenizer, question, controls=True)
        if not self._ends_known:
            self.model.reasoner.end_at(end_of_turn_id(self.tokenizer, self.template))
            self._ends_known = True
        messages = [_message(message) for message in _messages(question)]
        return prompt_ids(self.tokenizer, messages, self.template)

    def stops(self, texts: Sequence[str]) -> Any:
        """A `Stop` for `generate` that ends an answer at the first of these texts; None if there are none."""
        if not texts:
            return None
        return lambda tokens: any(text in self._decode(tokens) for text in texts)

    def answer(self, turn: AgentTurn, stop: Sequence[str] = ()) -> Answer:
        """What a generated turn says.

        Args:
            turn: as `generate` made it.
            stop: texts before which the answer ends.
        """
        text = AnswerText(self.tokenizer, stop)
        insertions = []
        for number, token in enumerate(turn.tokens):
            if number in turn.insertion_points:
                insertions.append(Insertion(number, len(text.given), self.latents_before(number)))
            text.add(token)
        text.end()
        return Answer(
            text=text.given,
            tokens=tuple(turn.tokens),
            logprobs=tuple(turn.logprobs),
            insertions=tuple(insertions),
            work=turn.work,
            finished=turn.finished,
            prompt_tokens=len(turn.context),
        )

    def latents_before(self, token: int) -> int:
        """How many latents an insertion before a token of an answer has."""
        return self.model.weaver.config.latents(InsertionKind.INFERENCE if token else InsertionKind.PROMPT)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @torch.no_grad()
    def remember(
        self, question: Question, answer: Answer, reward: float = 1.0, *, raw: bool = False
    ) -> Kept | None:
        """Keeps an answer's blocks in the latent bank, once its reward is known. They are woven again for it.

        Args:
            question: as it was asked.
            answer: what `generate` or `stream` gave for it.
            reward: of the answer; below the bank's `min_reward` nothing is kept.
            raw: as it was asked.

        Returns:
            What was kept; None if nothing was.

        Raises:
            ValueError: if the agent has no bank to write.
            OSError: if the bank cannot be written; it is then as it was.
        """
        bank = bank_to_write(self.model)
        if bank is None:
            raise ValueError(
                "this agent has no latent bank to write: load it with bank={'path': FILE}, and write not false"
            )
        if not answer.insertions:
            return None
        prompt = self.prompt(question, raw=raw)
        ids = [*prompt, *answer.tokens]
        points = [
            (len(prompt) + i.token, int(InsertionKind.INFERENCE if i.token else InsertionKind.PROMPT))
            for i in answer.insertions
        ]
        supervised = [index >= len(prompt) for index in range(len(ids))]
        woven = self.model.label_scores(
            TokenBatch.from_rows([ids], [supervised]), InsertionPlan([points])
        ).woven
        blocks = woven.latents.split([i.latents for i in answer.insertions])
        return bank.remember("asked/" + self._decode(prompt), reward, [(ids, points)], blocks)

    # Files

    def save_pretrained(
        self, directory: str | Path, *, bases: Mapping[str, str] | None = None, licence: str | None = None
    ) -> None:
        """Writes a checkpoint folder with a model card (README.md), whole or not at all.

        Args:
            directory: the target; an older checkpoint there is replaced.
            bases: other names for bases, as `{"/models/qwen": "Qwen/Qwen2.5-1.5B-Instruct"}`. A load refuses a base with
                other weights.
            licence: of the weights, as an SPDX or hub identifier; None: the base's, if its card is on this machine.

        Raises:
            ValueError: if `bases` names a base that the agent does not have.
            OSError: if the folder is something else than a checkpoint, or cannot be written.
        """
        self._save(Path(directory), Path(directory).name, bases, licence)

    def _save(self, folder: Path, name: str, bases: Mapping[str, str] | None, licence: str | None) -> None:
        config = _renamed(self.config, bases or {})
        save_checkpoint(
            self.model,
            config,
            folder,
            with_trigger=self._trigger_is_trained,
            text=self._text,
            beside={CARD: Card.of(self.model, config, self.source, licence).text(name)},
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        bases: Mapping[str, str] | None = None,
        licence: str | None = None,
        message: str = "Upload a MemGen agent",
    ) -> str:
        """Publishes the agent on the Hugging Face hub, from where `memgen.load("hf://ORG/NAME")` loads it.

        What is uploaded are the files of `save_pretrained`: the trained tensors, their description and a model card, which
        says what the agent's run and its recorded tests (`memgen test`) say. The base is not uploaded.

        Args:
            repository: ORG/NAME; made if it does not exist.
            private: whether a new repository is private.
            bases: as in `save_pretrained`; needed for a base that is a folder of this machine.
            licence: as in `save_pretrained`.
            message: of the commit.

        Returns:
            The commit's address.

        Raises:
            ValueError: if a base is a folder of this machine, which no one else has.
            ConnectionError: if the hub refuses or does not answer.
        """
        for name in _base_names(_renamed(self.config, bases or {})):
            if Path(name).exists() or name.startswith("tiny:"):
                raise ValueError(
                    f"the base {name} is on this machine only; say what it is called on the hub: "
                    f"bases={{{name!r}: 'ORG/NAME'}}"
                )
        with TemporaryDirectory() as temporary:
            folder = Path(temporary) / "agent"
            self._save(folder, repository, bases, licence)
            return upload(folder, repository, private=private, message=message)

    @property
    def _trigger_is_trained(self) -> bool:
        if self.source is None:
            return bool(self.model.trigger.own_parameters())
        return (current(self.source) / TRIGGER_FILE).exists()


def is_question(value: Any) -> bool:
    """Whether something is one question rather than a list of them."""
    return isinstance(value, str) or (len(value) > 0 and isinstance(value[0], Mapping))


def _external(**given: tuple[type[Any], Any]) -> dict[str, Any]:
    """Settings of what the weaver reads besides the stream, where others than the checkpoint's are wanted."""
    return {
        name: parse(kind, settings) if isinstance(settings, Mapping) else settings
        for name, (kind, settings) in given.items()
        if settings != "checkpoint"
    }


def _messages(question: Question) -> Sequence[Message]:
    if isinstance(question, str):
        return [{"role": "user", "content": question}]
    return question


def _message(message: Any) -> Message:
    """A message with what templates need.

    Raises:
        ValueError: if it is none.
    """
    roles = ("system", "user", "assistant", "tool")
    if not isinstance(message, Mapping) or message.get("role") not in roles:
        raise ValueError(
            f"a message is a mapping with a role ({', '.join(roles)}) and content, got {message!r:.80}"
        )
    if not isinstance(message.get("content"), str):
        reason = f"a message's content is a text, got {message.get('content')!r:.80}"
        raise ValueError(reason)  # noqa: TRY004 - the message is wrong, not the call
    return cast(Message, {"role": message["role"], "content": message["content"]})


def _stop_texts(stop: Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(texts):
        raise ValueError("a stop text is empty; leave it out")
    return texts


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint of a run's folder; any other folder itself."""
    for inner in () if (folder / CONFIG_FILE).exists() else ("best", "last"):
        if (folder / inner / CONFIG_FILE).is_file():
            return folder / inner
    return folder


def _base_names(config: MemGenConfig) -> list[str]:
    own = (config.backbone, config.weaver.backbone, config.trigger.backbone)
    return [base.name for base in own if base is not None]


def _renamed(config: MemGenConfig, names: Mapping[str, str]) -> MemGenConfig:
    """The configuration with other names for its bases.

    Raises:
        ValueError: if a name to replace is not there.
    """
    known = _base_names(config)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"bases names {unknown[0]!r}, but the agent's bases are {', '.join(known)}")

    def renamed(base: BackboneConfig) -> BackboneConfig:
        return replace(base, name=names.get(base.name, base.name))

    changes = {
        part: dataclasses.replace(getattr(config, part), backbone=renamed(getattr(config, part).backbone))
        for part in ("weaver", "trigger")
        if getattr(config, part).backbone is not None
    }
    return replace(config, backbone=renamed(config.backbone), **changes)
