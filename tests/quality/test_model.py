"""The trained architecture is the one that transformers and vLLM load."""

from pathlib import Path

import torch
import transformers
from quality.batches import make_batch
from quality.model import Reasoner, Shape, export
from quality.problems import calibration_text
from quality.ship import MODEL, demo_problems
from quality.vocabulary import IDS, WORDS

from triattention_vllm.tools.reasoner import LONGEST_PROMPT, problems


def test_our_model_computes_what_transformers_computes_from_its_weights(tmp_path: Path) -> None:
    model = Reasoner(Shape(), seed=3)
    export(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = make_batch(0, 0, 4, 128).ids
    with torch.no_grad():
        ours, expected = model(ids).float(), theirs(ids).logits
    # Ours computes in bfloat16, whose rounding is 2^-8, over four layers.
    assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_the_tokenizer_gives_one_token_per_word(tmp_path: Path) -> None:
    export(Reasoner(Shape(), seed=0), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "<bos> dfs n4 : n63 ; start n4 step 0 2 ?"
    assert tokenizer.encode(text) == [IDS[word] for word in text.split()]
    assert tokenizer.decode(range(len(WORDS))).split() == list(WORDS)


def test_the_texts_beside_the_shipped_model_are_those_that_the_tasks_make() -> None:
    assert (MODEL / "calibration.txt").read_text(encoding="utf-8") == calibration_text()
    assert (MODEL / "problems.jsonl").read_text(encoding="utf-8") == demo_problems()
    assert max(len(problem.prompt.split()) for problem in problems()) <= LONGEST_PROMPT


def test_the_shipped_tokenizer_and_config_are_those_of_the_architecture(tmp_path: Path) -> None:
    export(Reasoner(Shape(), seed=0), tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (MODEL / name).read_bytes() == (tmp_path / name).read_bytes()
