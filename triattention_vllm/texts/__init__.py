"""The calibration text that is shipped: prose, code, mathematics and dialogue, written for it."""

from importlib.resources import files

GENRES = ("prose", "code", "mathematics", "dialogue")


def shipped_text() -> str:
    """All genres in turn, one after the other; at least 8k tokens for a usual tokenizer."""
    folder = files("triattention_vllm.texts")
    return "\n\n".join(
        folder.joinpath(f"{genre}.txt").read_text(encoding="utf-8") for genre in GENRES
    )
