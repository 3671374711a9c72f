"""What a task generates: prompts and the one right answer to each, word by word."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from quality.vocabulary import EOS

HARD_WEIGHT = 4.0


@dataclass
class Answer:
    """Words that follow from the prompt, and which of them depend on memory.

    A word is *graded* where it must be looked up (a value, a neighbour, a stack entry); words
    that the form alone gives are not. No word depends on a bare count. The *weight* of a word
    is what it counts in training: words that are few and slow to learn weigh more.
    """

    words: list[str] = field(default_factory=list)
    graded: list[bool] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def form(self, *words: str) -> None:
        """Append words that the form of the answer gives."""
        self._append(words, graded=False)

    def memory(self, *words: str, weight: float = 1.0) -> None:
        """Append words that depend on what was read or written before."""
        self._append(words, graded=True, weight=weight)

    def hard(self, *words: str) -> None:
        """Append words that depend on memory and are few or slow to learn: sums and carries, the
        end of a trace."""
        self.memory(*words, weight=HARD_WEIGHT)

    def end(self) -> None:
        """Append the end of the answer."""
        self.form(EOS)

    def cut(self, surplus: int) -> None:
        """Take away the last words."""
        if surplus:
            del self.words[-surplus:], self.graded[-surplus:], self.weights[-surplus:]

    def _append(self, words: Sequence[str], graded: bool, weight: float = 1.0) -> None:
        self.words += words
        self.graded += [graded] * len(words)
        self.weights += [weight] * len(words)


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
