"""The calibration text that is shipped."""

import re
from collections import Counter
from importlib.resources import files

from triattention_vllm.texts import GENRES, shipped_text


def test_the_text_is_long_enough_for_eight_thousand_tokens() -> None:
    # A usual tokenizer makes a token of 4 to 4.5 characters of English and of fewer elsewhere.
    assert len(shipped_text()) > 40_000
    words_and_signs = re.findall(r"\w+|[^\w\s]", shipped_text())
    assert len(words_and_signs) > 8_000


def test_every_genre_has_its_share() -> None:
    folder = files("triattention_vllm.texts")
    for genre in GENRES:
        assert len(folder.joinpath(f"{genre}.txt").read_text(encoding="utf-8")) > 9_000
        assert folder.joinpath(f"{genre}.txt").read_text(encoding="utf-8")[:200] in shipped_text()


def test_the_text_does_not_repeat_itself() -> None:
    lines = [line.strip() for line in shipped_text().splitlines() if len(line.strip()) > 60]
    assert max(Counter(lines).values()) == 1
    words = shipped_text().split()
    phrases = Counter(zip(*(words[shift:] for shift in range(8)), strict=False))
    assert max(phrases.values()) <= 3
