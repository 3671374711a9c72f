"""What a task generates: prompts and the one right answer to each, word by word."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quality.vocabulary import EOS


@dataclass
class Answer:
    """Words that follow from the prompt, and which of them depend on memory.

    A word is *graded* where it must be looked up (a value, a neighbour, a stack entry); words
    that the form alone gives are not. No word depends on a bare count.
    """

    words: list[str] = field(default_factory=list)
    graded: list[bool] = field(default_factory=list)

    def form(self, *words: str) -> None:
        """Append words that the form of the answer gives."""
        self.words += words
        self.graded += [False] * len(words)

    def memory(self, *words: str) -> None:
        """Append words that depend on what was read or written before."""
        self.words += words
        self.graded += [True] * len(words)

    def end(self) -> None:
        """Append the end of the answer."""
        self.form(EOS)


@dataclass
class Turn:
    """A prompt and its answer."""

    prompt: list[str]
    answer: Answer


@dataclass
class Problem:
    """Turns that build on one another; the answer to the last one is what a run is judged by."""

    task: str
    turns: Sequence[Turn]

    @property
    def prompt(self) -> list[str]:
        """Everything before the last answer."""
        words: list[str] = []
        for turn in self.turns[:-1]:
            words += turn.prompt + turn.answer.words
        return words + self.turns[-1].prompt

    @property
    def answer(self) -> Answer:
        """The last answer."""
        return self.turns[-1].answer

    @property
    def num_words(self) -> int:
        """Words of all turns."""
        return sum(len(turn.prompt) + len(turn.answer.words) for turn in self.turns)
