"""The lab's word-level tokenizer: one token for each word, digit, delimiter and newline."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memgen.lab.world import ITEMS, PLACES

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"

VOCABULARY = (
    PAD, END, UNKNOWN,
    "\n", ",", ".", ":", "#",
    *"0123456789",
    "shop", "list", "bill", "add", "rev", "walk", "up", "down",
    "task", "bring", "to", "go", "take", "put", "hold", "nothing",
    *ITEMS,
    *PLACES,
)  # fmt: skip
"""Every token, in the order of its id."""

# Messages follow each other as they are; an assistant message is closed by the end token.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer.

    Words are separated by spaces and newlines; a newline is a token. Decoding joins with spaces, except around newlines,
    so that the lab's own texts come back as they were.

    Returns:
        A tokenizer with end, padding and unknown tokens and a chat template that concatenates the messages.
    """
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", behavior="removed"),
            pre_tokenizers.Split("\n", behavior="isolated"),
        ]
    )
    # The WordPiece decoder puts a space before every token but the first; no token has its continuation prefix.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="<continued>", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
