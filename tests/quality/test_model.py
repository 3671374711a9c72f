"""The trained architecture is the one that transformers and vLLM load."""

from pathlib import Path

import torch
import transformers
from quality.batches import make_batch
from quality.model import Reasoner, Shape, export
from quality.vocabulary import IDS, WORDS


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
