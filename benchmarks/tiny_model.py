"""A small random-weight model folder that stock vLLM loads without a network.

Plain random weights attend to everything alike, so that eviction would change nothing. Here the
embeddings share a direction (queries before RoPE are concentrated, ``R_f`` near 0.6, as in trained
models) and the query and key norms are large enough for logits with a standard deviation near 3
between keys: what a round evicts is visible in the log-probabilities.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Architecture = Literal["qwen3", "llama"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_PAIRS = [first + second for first in _LETTERS for second in _LETTERS]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = MIN_VOCAB_SIZE + len(_PAIRS)

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_SPACE = _ALPHABET.index("\u0120")

_SHARED_VARIANCE = 0.4
_NORM_SCALE = 1.7
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_model(
    folder: str | Path,
    *,
    architecture: Architecture = "qwen3",
    num_layers: int = 4,
    hidden_size: int = 256,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    vocab_size: int = 512,
    max_position_embeddings: int = 32768,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Path:
    """Write config, weights, tokenizer and chat template into ``folder`` and return it.

    The same arguments write the same bytes. No token that ends a text, and no token that is not
    printable ASCII, is ever likely, so an answer runs to the length that was asked for.

    Raises ValueError where ``vocab_size`` cannot be made from bytes, special tokens and letter
    pairs, or ``num_heads`` is no multiple of ``num_kv_heads``.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; allowed are {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}."
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads}, which is no multiple of num_kv_heads ({num_kv_heads})."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [{"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[architecture]],
        "model_type": architecture,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": 256 + SPECIAL_TOKENS.index("<|im_end|>"),
    }
    _write_json(folder / "config.json", config)
    weights = _random_weights(
        architecture, num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size, seed
    )
    stored = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, vocab_size)
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level tokenizer: ids 0-255 are bytes in the order of their printable stand-ins, then
    the special tokens, then pairs of letters up to ``vocab_size``."""
    vocab = {token: idx for idx, token in enumerate([*_ALPHABET, *SPECIAL_TOKENS])}
    pairs = _PAIRS[: vocab_size - len(vocab)]
    vocab |= {pair: len(vocab) + idx for idx, pair in enumerate(pairs)}
    merges = [(pair[0], pair[1]) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": vocab["<|im_end|>"], "pad_token_id": vocab["<|endoftext|>"]},
    )


def likely_tokens(vocab_size: int) -> torch.Tensor:
    """Which ids an answer may consist of: printable ASCII and letter pairs. bool [vocab_size]"""
    likely = torch.ones(vocab_size, dtype=torch.bool)
    for idx, token in enumerate(_ALPHABET):
        likely[idx] = idx == _SPACE or "!" <= token <= "~"
    likely[256 : 256 + len(SPECIAL_TOKENS)] = False
    return likely


def concentrated_embeddings(
    vocab_size: int, hidden_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input embeddings ``sqrt(s) m + sqrt(1 - s) n_t`` with a shared direction ``m`` of variance
    share ``s = 0.4``, and an output matrix that pushes unlikely tokens away along ``m``.

    Returns (embedding, lm_head), each float32 [vocab_size, hidden_size].
    """
    shared = torch.randn(hidden_size, generator=generator)
    own = torch.randn(vocab_size, hidden_size, generator=generator)
    embedding = math.sqrt(_SHARED_VARIANCE) * shared + math.sqrt(1 - _SHARED_VARIANCE) * own
    lm_head = (
        torch.randn(vocab_size, hidden_size, generator=generator) * 3.0 / math.sqrt(hidden_size)
    )
    along_shared = (lm_head @ shared / shared.square().sum()).unsqueeze(1) * shared
    lm_head = lm_head - along_shared
    lm_head[~likely_tokens(vocab_size)] -= 60.0 / hidden_size * shared
    lm_head[_SPACE] += 5.0 / hidden_size * shared
    return embedding, lm_head


def _random_weights(
    architecture: Architecture,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def linear(num_out: int, num_in: int, gain: float = 1.0) -> torch.Tensor:
        return gain / math.sqrt(num_in) * torch.randn(num_out, num_in, generator=generator)

    def norm(gain: float, size: int) -> torch.Tensor:
        return gain * torch.exp(0.3 * torch.randn(size, generator=generator))

    embedding, lm_head = concentrated_embeddings(vocab_size, hidden_size, generator)
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(hidden_size),
        "lm_head.weight": lm_head,
    }
    query_gain = _NORM_SCALE if architecture == "llama" else 1.0
    for layer_idx in range(num_layers):
        layer = {
            "self_attn.q_proj": linear(num_heads * head_dim, hidden_size, query_gain),
            "self_attn.k_proj": linear(num_kv_heads * head_dim, hidden_size, query_gain),
            "self_attn.v_proj": linear(num_kv_heads * head_dim, hidden_size),
            "self_attn.o_proj": linear(hidden_size, num_heads * head_dim, 0.9),
            "mlp.gate_proj": linear(2 * hidden_size, hidden_size),
            "mlp.up_proj": linear(2 * hidden_size, hidden_size),
            "mlp.down_proj": linear(hidden_size, 2 * hidden_size, 0.5),
            "input_layernorm": torch.ones(hidden_size),
            "post_attention_layernorm": torch.ones(hidden_size),
        }
        if architecture == "qwen3":
            layer["self_attn.q_norm"] = norm(_NORM_SCALE, head_dim)
            layer["self_attn.k_norm"] = norm(_NORM_SCALE, head_dim)
        weights |= {f"model.layers.{layer_idx}.{name}.weight": w for name, w in layer.items()}
    return weights


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
