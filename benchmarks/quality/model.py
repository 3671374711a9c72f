"""The small reasoner: Qwen3's architecture in plain torch, with the weight names of transformers.

Pre-norm blocks of grouped-query attention (RMS-normed queries and keys, rotary positions in half
pairs) and a SwiGLU MLP; embeddings and output head are separate. Parameters are float32, arithmetic
is bfloat16 unless told otherwise.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from quality.vocabulary import BOS, EOS, IDS, PAD, VOCAB_SIZE, write_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

SHARED = 0.4


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; 2.4 million parameters."""

    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    rope_theta: float = 10000.0
    max_length: int = 8192


class Attention(nn.Module):
    """Causal attention of H query heads over H_kv KV heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.num_heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=1e-6)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, hidden]; cos, sin: [T, D]. Returns [B, T, hidden]."""
        kv_heads = self.shape.num_kv_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([projection.weight for projection in projections])
        heads = functional.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.shape.head_dim))
        query, key, value = heads.split((self.shape.num_heads, kv_heads, kv_heads), dim=2)
        normed = torch.cat((norm(query, self.q_norm), norm(key, self.k_norm)), dim=2)
        rotated = rotate(normed, cos, sin).transpose(1, 2)
        query, key = rotated.split((self.shape.num_heads, kv_heads), dim=1)
        out = functional.scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return functional.linear(out.transpose(1, 2).flatten(2), self.o_proj.weight.to(x.dtype))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, hidden]. Returns the same shape."""
        weight = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x.dtype)
        gate, up = functional.linear(x, weight).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down_proj.weight.to(x.dtype))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=1e-6)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=1e-6)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, T, hidden]. Returns the same shape."""
        x = x + self.self_attn(norm(x, self.input_layernorm), cos, sin)
        return x + self.mlp(norm(x, self.post_attention_layernorm))


class Trunk(nn.Module):
    """Embeddings, blocks and last norm."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns normed hidden states [B, T, hidden]."""
        positions = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device)
        pairs = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32, device=ids.device)
        powers = pairs / self.shape.head_dim
        angles = positions[:, None] * self.shape.rope_theta**-powers
        angles = torch.cat((angles, angles), dim=-1)  # [T, D]
        x = self.embed_tokens(ids).to(self.dtype)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return norm(x, self.norm)


class Reasoner(nn.Module):
    """The whole model; ``state_dict`` has the names of transformers' Qwen3ForCausalLM."""

    def __init__(self, shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model = Trunk(shape, dtype)
        self.lm_head = nn.Linear(shape.hidden_size, VOCAB_SIZE, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "embed" in name:
                    _similar_rows(parameter, generator)
                elif parameter.dim() == 2:
                    last = name.endswith(("o_proj.weight", "down_proj.weight"))
                    scale = 0.02 if last else parameter.shape[1] ** -0.5
                    parameter.normal_(0, scale, generator=generator)
                elif name.endswith(("q_norm.weight", "k_norm.weight")):
                    # With 1, no query can look at one token much more than at its neighbours.
                    parameter.fill_(1.5)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [B, T]. Returns logits [B, T, vocabulary]."""
        hidden = self.model(ids)
        return functional.linear(hidden, self.lm_head.weight.to(hidden.dtype))


def _similar_rows(embedding: Tensor, generator: torch.Generator) -> None:
    """Rows of unit variance, SHARED of it in one direction that all words have.

    Without biases that direction is all that queries and keys can tell positions with, whatever
    the words are; looking back is learned several times faster than from small, unrelated rows.
    """
    common = torch.empty(embedding.shape[1]).normal_(0, SHARED**0.5, generator=generator)
    embedding.normal_(0, (1 - SHARED) ** 0.5, generator=generator).add_(common)


def norm(x: Tensor, module: nn.RMSNorm) -> Tensor:
    """RMS norm in the dtype of ``x``, which is what lets torch run it as one kernel."""
    return functional.rms_norm(x, module.normalized_shape, module.weight.to(x.dtype), module.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in half (NeoX) pairs: x [B, T, heads, D], cos and sin [T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def export(model: Reasoner, folder: Path) -> None:
    """Write weights (bfloat16), config and tokenizer as transformers and vLLM load them."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = model.model.shape
    weights = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": shape.max_length,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": IDS[BOS],
        "eos_token_id": IDS[EOS],
        "pad_token_id": IDS[PAD],
    }
    _write_json(folder / "config.json", config)
    ends = {"bos_token_id": IDS[BOS], "eos_token_id": IDS[EOS], "pad_token_id": IDS[PAD]}
    _write_json(folder / "generation_config.json", ends)
    write_tokenizer(folder, shape.max_length)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
