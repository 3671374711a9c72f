"""Does a needle survive in a hybrid model as well as in a dense one, at equal budget?

    python benchmarks/needle.py [--tiny] [--output FILE]

The model is built by hand and looks facts up: its first layer notes with each token which one came
before it, its second finds the token that followed the one now read, and says it; two more layers
attend to anything and say nothing. Both kinds of model have the same weights; in the hybrid one the
first and third layer see a sliding window. A prompt hides facts (an upper-case letter, then a
digit) in lower-case text and asks for one of them. It is longer than the budget, so rounds run
while it is read. Writes one JSON file.
"""

import json
import multiprocessing
import random
import string
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from engine import conditions
from reporting import run_in_a_size, write_json
from safetensors.torch import save_file
from tiny_model import MIN_VOCAB_SIZE, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import normalize

Json = dict[str, Any]
Projections = tuple[Tensor, Tensor, Tensor, Tensor]
KINDS = ("dense", "hybrid")
KEYS, VALUES, FILLER = string.ascii_uppercase, string.digits, string.ascii_lowercase + " "

VOCAB_SIZE = MIN_VOCAB_SIZE
HEAD_DIM = 128
NUM_STILL = 24
"""Pairs of a head that hardly turn within a prompt: there content is compared."""
THETA = 1e7
CODE = 32
LETTER, TOKEN, BEFORE, SAID, CONSTANT = (slice(i * CODE, (i + 1) * CODE) for i in range(5))
"""Parts of the residual stream: the letter that a key is, the token, the letter before it, what
will be said, and a number that all tokens share."""
HIDDEN = 5 * CODE


@dataclass(frozen=True)
class Size:
    """methods: of compression, None for full attention. Every depth is asked num_prompts times."""

    prompt_tokens: int
    budgets: tuple[int, ...]
    methods: tuple[str | None, ...]
    num_depths: int
    num_prompts: int
    num_facts: int
    interval: int = 32
    window: int = 32
    chunk: int = 128


NORMAL = Size(1500, (96,), (None, "triattention", "random", "streamingllm"), 9, 6, 20)
TINY = Size(500, (128,), ("triattention",), 5, 2, 6)


def write_lookup_model(folder: Path, kind: str) -> Path:
    """Llama's architecture without an MLP; the second of two heads attends to anything."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(11)
    embedding, token_code = _embeddings(generator)
    lm_head = torch.zeros(VOCAB_SIZE, HIDDEN)
    lm_head[:, SAID] = token_code
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": lm_head,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer, write in enumerate((_note_letter_before, _look_up, None, None)):
        projections = _idle_heads(generator)
        if write is not None:
            write(*projections)
        name = f"model.layers.{layer}"
        for part, weight in zip("qkvo", projections, strict=True):
            weights[f"{name}.self_attn.{part}_proj.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = torch.ones(HIDDEN)
        for part, shape in (("gate", (32, HIDDEN)), ("up", (32, HIDDEN)), ("down", (HIDDEN, 32))):
            weights[f"{name}.mlp.{part}_proj.weight"] = torch.zeros(shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config: Json = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "rope_theta": THETA,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": MIN_VOCAB_SIZE - 1,
        "torch_dtype": "float32",
    }
    if kind == "hybrid":
        config["layer_types"] = ["sliding_attention", "full_attention"] * 2
        config["sliding_window"] = 64
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, VOCAB_SIZE)
    return folder


def _embeddings(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Embeddings [vocab, hidden], and the tokens' codes [vocab, CODE].

    Letters that are keys share half of their code, as words of one kind do; other tokens have a
    little of anything in its place.
    """
    own, token_code = normalize(torch.randn(2, VOCAB_SIZE, CODE, generator=generator), dim=-1)
    shared = normalize(torch.randn(CODE, generator=generator), dim=-1)
    is_key = torch.zeros(VOCAB_SIZE, 1)
    is_key[list(ids_of(KEYS))] = 1
    embedding = torch.zeros(VOCAB_SIZE, HIDDEN)
    embedding[:, LETTER] = torch.where(is_key > 0, 0.5**0.5 * (own + shared), 0.1 * own)
    embedding[:, TOKEN] = token_code
    embedding[:, CONSTANT.start] = 1
    # All rows equally long, so that a norm leaves the constant the same for all tokens.
    embedding[:, CONSTANT.start + 1] = (4 - embedding.square().sum(1)).sqrt()
    return embedding, token_code


def _idle_heads(generator: torch.Generator) -> Projections:
    """Query, key, value and output of two heads that attend to anything and say nothing."""
    query, key = 1.7 / HIDDEN**0.5 * torch.randn(2, 2 * HEAD_DIM, HIDDEN, generator=generator)
    return query, key, torch.zeros(2 * HEAD_DIM, HIDDEN), torch.zeros(HIDDEN, 2 * HEAD_DIM)


def _note_letter_before(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Head 0 reads the token before: ``q_f = A exp(-i w_f)``, ``k_f = A`` in all pairs that turn,
    so that the logit at distance d is ``A^2 sum_f cos(w_f (d - 1))``."""
    half, turning, strength = HEAD_DIM // 2, HEAD_DIM // 2 - NUM_STILL, 3.0
    frequency = THETA ** (-torch.arange(half) / half)[:turning]
    query[:HEAD_DIM], key[:HEAD_DIM] = 0, 0
    query[:turning, CONSTANT.start] = strength * frequency.cos()
    query[half : half + turning, CONSTANT.start] = -strength * frequency.sin()
    key[:turning, CONSTANT.start] = strength
    value[:CODE, LETTER] = torch.eye(CODE)
    out[BEFORE, :CODE] = 0.15 * torch.eye(CODE)


def _look_up(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Head 0 compares the letter that is read with the letters before the cached tokens, in pairs
    that stand still, and says the token that it finds."""
    half = HEAD_DIM // 2
    still = [*range(half - NUM_STILL, half), *range(HEAD_DIM - CODE + NUM_STILL, HEAD_DIM)]
    query[:HEAD_DIM], key[:HEAD_DIM] = 0, 0
    query[still, LETTER] = 4 * torch.eye(CODE)
    key[still, BEFORE] = 4 * torch.eye(CODE)
    value[:CODE, TOKEN] = torch.eye(CODE)
    out[SAID, :CODE] = torch.eye(CODE)


@cache
def ids_of(text: str) -> tuple[int, ...]:
    """Token ids: one for each character."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), MIN_VOCAB_SIZE)
        return tuple(Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids)


def prompt(size: Size, depth_idx: int, rng: random.Random) -> tuple[str, str]:
    """(prompt, answer): the fact that is asked for stands at ``depth_idx`` of ``num_depths``
    equal parts, the others anywhere."""
    asked, *others = rng.sample(KEYS, size.num_facts)
    part = (size.prompt_tokens - 3) / size.num_depths
    place = int((depth_idx + 0.5) * part)
    text = rng.choices(FILLER, k=size.prompt_tokens - 1)
    free = [start for start in range(0, size.prompt_tokens - 3, 2) if abs(start - place) > 2]
    answer = rng.choice(VALUES)
    text[place : place + 2] = asked, answer
    for key, start in zip(others, rng.sample(free, len(others)), strict=True):
        text[start : start + 2] = key, rng.choice(VALUES)
    return "".join(text) + asked, answer


def text_for_calibration(num_characters: int) -> str:
    """Lower-case text with facts and questions, of other draws than the prompts."""
    rng = random.Random("calibration")
    parts = ["".join(rng.choices(FILLER, k=40)) + rng.choice(KEYS) + rng.choice(VALUES)]
    while sum(map(len, parts)) < num_characters:
        parts.append("".join(rng.choices(FILLER, k=40)) + rng.choice(KEYS) + rng.choice(VALUES))
    return "".join(parts)


def answers(model: str, settings: Json | None, size: Size, cache_folder: str) -> list[list[bool]]:
    """Per depth, whether each prompt was answered rightly; runs in a process of its own."""
    import os

    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_PLUGINS="triattention_vllm",
        HF_HUB_OFFLINE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        TRIATTENTION_CACHE=cache_folder,
    )
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        kv_cache_memory_bytes=128 << 20,
        max_model_len=size.prompt_tokens + 32,
        max_num_batched_tokens=size.chunk,
        enable_prefix_caching=False,
        additional_config={} if settings is None else {"kv_compression": settings},
    )
    rng = random.Random(3)
    asked = [
        prompt(size, depth_idx, rng)
        for depth_idx in range(size.num_depths)
        for _ in range(size.num_prompts)
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": list(ids_of(text))} for text, _ in asked],
        SamplingParams(max_tokens=1, temperature=0.0),
        use_tqdm=False,
    )
    right = [
        output.outputs[0].text == answer for output, (_, answer) in zip(outputs, asked, strict=True)
    ]
    step = size.num_prompts
    return [right[start : start + step] for start in range(0, len(right), step)]


def cases(size: Size) -> list[tuple[str | None, int | None]]:
    """(method, budget) of every engine; full attention has no budget."""
    methods = [method for method in size.methods if method is not None]
    full: list[tuple[str | None, int | None]] = [(None, None)] if None in size.methods else []
    return [*full, *((method, budget) for budget in size.budgets for method in methods)]


def run(size: Size, output: Path) -> None:
    """Ask both kinds of model and write ``output``."""
    results: list[Json] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(text_for_calibration(6000), encoding="utf-8")
        models = {kind: str(write_lookup_model(Path(folder, kind), kind)) for kind in KINDS}
        for method, budget in cases(size):
            settings = None
            if method is not None:
                settings = {"method": method, "budget": budget}
                settings |= {"interval": size.interval, "window": size.window}
                if method == "triattention":
                    settings["calibration_text"] = str(text)
            result: Json = {"method": method or "full attention", "budget": budget}
            for kind in KINDS:
                with context.Pool(1) as pool:
                    found = pool.apply(answers, (models[kind], settings, size, folder))
                result[kind] = [sum(of_depth) / len(of_depth) for of_depth in found]
            results.append(result)
            print(row(result), flush=True)
    write_json(output, {"conditions": conditions(size, {}), "results": results})


def row(result: Json) -> str:
    """One line of the table in docs/features.md: right answers by depth, in percent."""
    shares = [" ".join(f"{100 * share:.0f}" for share in result[kind]) for kind in KINDS]
    return f"| {result['method']} | {result['budget'] or ''} | {shares[0]} | {shares[1]} |"


def markdown_table(report: Json) -> str:
    """The figures of a report as docs/features.md shows them."""
    rows = ["| method | budget | dense | hybrid |", "| --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(row, report["results"])])


if __name__ == "__main__":
    run_in_a_size(run, NORMAL, TINY, __doc__, "needle")
