"""The 128 words of the small reasoner and its tokenizer: one word, one token."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

SPECIAL = ("<pad>", "<bos>", "<eos>")
TASKS = ("dfs", "machine", "recall", "needle", "add")
SIGNS = (":", ";", "=", ">", "+", "-", "?", "!", "|", "x", "o", "root", "start", "step", "<unk>")
DIGITS = tuple("0123456789")
LETTERS = tuple("abcdefghijklmnpqrstuvwyz")
SYMBOLS = tuple(f"n{idx}" for idx in range(64))

_WORDS = (*SPECIAL, *TASKS, *SIGNS, *DIGITS, *LETTERS, *SYMBOLS)
VOCAB_SIZE = 128
WORDS = (*_WORDS, *(f"<spare{idx}>" for idx in range(VOCAB_SIZE - len(_WORDS))))
IDS = {word: idx for idx, word in enumerate(WORDS)}

PAD, BOS, EOS = SPECIAL


def write_tokenizer(folder: Path, max_length: int) -> None:
    """Write the tokenizer that vLLM and transformers load: words with spaces between them."""
    tokenizer = Tokenizer(models.WordLevel(vocab=IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        # A conversation is its words one after another: the tasks know no speakers.
        "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
