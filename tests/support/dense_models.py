"""Decoder families in float64, written from their definitions and read from safetensors.

Nothing of vLLM and nothing of transformers' modelling code: only ``config.json`` and
``model.safetensors`` of a folder. The table of rotary angles is the one part in float32, because
that is what the models define (frequencies, angle, cosine and sine are float32 there too).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Json = dict[str, Any]


@dataclass(frozen=True)
class DenseRotary:
    """inv_freq: float32 [F]; rotary_dim = 2F; interleaved pairs (2f, 2f+1), else (f, f+F).
    factor: every rotated dim is multiplied by it (YaRN)."""

    inv_freq: Tensor
    rotary_dim: int
    interleaved: bool
    factor: float = 1.0

    def pairs(self, x: Tensor) -> Tensor:
        """Rotated dims of ``x`` [..., D] as complex128 [..., F]."""
        if self.interleaved:
            real, imag = x[..., 0 : self.rotary_dim : 2], x[..., 1 : self.rotary_dim : 2]
        else:
            half = self.rotary_dim // 2
            real, imag = x[..., :half], x[..., half : self.rotary_dim]
        return torch.complex(real.contiguous(), imag.contiguous())

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x_f exp(i w_f p)`` for x [H, n, D] at positions [n]."""
        angles = positions.float().unsqueeze(1) * self.inv_freq  # [n, F] float32
        turn = self.factor * torch.complex(angles.cos().double(), angles.sin().double())
        rotated = self.pairs(x) * turn
        parts = (rotated.real, rotated.imag)
        joined = torch.stack(parts, -1).flatten(-2) if self.interleaved else torch.cat(parts, -1)
        return torch.cat([joined, x[..., self.rotary_dim :]], -1)


NO_ROTATION = DenseRotary(torch.empty(0), 0, interleaved=False)


def default_inv_freq(theta: float, rotary_dim: int) -> Tensor:
    """``theta^(-2f / rotary_dim)``  float32 [F]."""
    return 1.0 / (theta ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim))


def llama3_inv_freq(inv_freq: Tensor, rope: Json) -> Tensor:
    """Llama 3.1: long waves divided by ``factor``, short ones kept, a ramp between them."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    ramp = (trained / wavelength - low) / (high - low)
    blended = (1 - ramp) * inv_freq / factor + ramp * inv_freq
    scaled = torch.where(wavelength > trained / low, inv_freq / factor, inv_freq)
    between = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(between, blended, scaled)


def yarn_inv_freq(inv_freq: Tensor, rope: Json, rotary_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, without rounding of the ramp's ends): waves that turn at least
    ``beta_fast`` times in the trained length are kept, those below ``beta_slow`` turns divided by
    ``factor``, a ramp over dims between them. Returns (frequencies, attention factor)."""
    factor, trained = rope["factor"], rope["original_max_position_embeddings"]

    def dim_of(turns: float) -> float:
        log_theta = math.log(rope["rope_theta"])
        return rotary_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * log_theta)

    low, high = max(dim_of(rope["beta_fast"]), 0), min(dim_of(rope["beta_slow"]), rotary_dim - 1)
    ramp = ((torch.arange(rotary_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), 0.1 * math.log(factor) + 1


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``x / sqrt(mean x^2 + eps) * weight``."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


class DenseModel(ABC):
    """The parts of a decoder around attention. x is the residual stream, float64 [n, hidden].

    ``attention_layers`` are the layers with keys and values; where a tensor has a dimension L, it
    is theirs, in this order. All other layers mix tokens by ``mix``.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: DenseRotary

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = weights

    @property
    def attention_layers(self) -> list[int]:
        return list(range(self.num_layers))

    @property
    def scale(self) -> float:
        """Factor of ``q k``."""
        return float(self.head_dim**-0.5)

    def rotary_of(self, layer_idx: int) -> DenseRotary:
        """How the layer rotates; ``NO_ROTATION`` where it does not."""
        del layer_idx
        return self.rotary

    def window_of(self, layer_idx: int) -> int | None:
        """Latest tokens that a query sees, itself included; None where it sees all."""
        del layer_idx
        return None

    def sinks_of(self, layer_idx: int) -> Tensor | None:
        """Learned logits [H] that take part in the softmax and have no value."""
        del layer_idx
        return None

    def mix(
        self, layer_idx: int, x: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output [n, hidden] of a layer without keys for the next n tokens, and its state behind
        them; state: what it returned for the tokens before, None where there are none."""
        raise NotImplementedError

    def gate(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        """The attention output, gated by the layer's input where a model does that."""
        del layer_idx, x
        return attended

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        epsilon = self.config.get("layer_norm_epsilon", self.config.get("layer_norm_eps"))
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, epsilon)

    def heads(self, x: Tensor) -> Tensor:
        """[n, H*D] to [H, n, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor: ...

    @abstractmethod
    def project(self, layer_idx: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value before RoPE and after any norm of theirs, each [H or H_kv, n, D]."""

    @abstractmethod
    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream behind the layer, given the attention output [n, H*D]."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor: ...


class LlamaLike(DenseModel):
    """Llama, and Qwen3 (which normalises queries and keys per head)."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config["num_key_value_heads"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        rope = config.get("rope_parameters") or config
        inv_freq = default_inv_freq(rope["rope_theta"], self.head_dim)
        if rope.get("rope_type", "default") == "llama3":
            inv_freq = llama3_inv_freq(inv_freq, rope)
        elif rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type {rope['rope_type']!r}; known are default and llama3.")
        self.rotary = DenseRotary(inv_freq, self.head_dim, interleaved=False)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["model.embed_tokens.weight"][tokens]

    def project(self, layer_idx: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = f"model.layers.{layer_idx}"
        x = self.norm(x, f"{layer}.input_layernorm")
        attention = f"{layer}.self_attn"
        query, key, value = (
            self.heads(self.linear(x, f"{attention}.{name}_proj")) for name in "qkv"
        )
        if f"{attention}.q_norm.weight" in self.weights:
            query = self.norm(query, f"{attention}.q_norm")
            key = self.norm(key, f"{attention}.k_norm")
        return query, key, value

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"model.layers.{layer_idx}"
        x = x + self.linear(attended, f"{layer}.self_attn.o_proj")
        inner = self.norm(x, f"{layer}.post_attention_layernorm")
        gate = functional.silu(self.linear(inner, f"{layer}.mlp.gate_proj"))
        up = self.linear(inner, f"{layer}.mlp.up_proj")
        return x + self.linear(gate * up, f"{layer}.mlp.down_proj")

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x, "model.norm"), "lm_head")


class GptJ(DenseModel):
    """GPT-J: interleaved pairs, partial rotary, attention and MLP in parallel."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        self.num_layers = config["n_layer"]
        self.num_heads = self.num_kv_heads = config["n_head"]
        self.head_dim = config["n_embd"] // self.num_heads
        inv_freq = default_inv_freq(10000.0, config["rotary_dim"])
        self.rotary = DenseRotary(inv_freq, config["rotary_dim"], interleaved=True)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["transformer.wte.weight"][tokens]

    def project(self, layer_idx: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = f"transformer.h.{layer_idx}"
        x = self.layer_norm(x, f"{layer}.ln_1")
        query, key, value = (
            self.heads(self.linear(x, f"{layer}.attn.{name}_proj")) for name in "qkv"
        )
        return query, key, value

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"transformer.h.{layer_idx}"
        inner = self.linear(self.layer_norm(x, f"{layer}.ln_1"), f"{layer}.mlp.fc_in")
        inner = functional.gelu(inner, approximate="tanh")
        attended = self.linear(attended, f"{layer}.attn.out_proj")
        return x + attended + self.linear(inner, f"{layer}.mlp.fc_out")

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x, "transformer.ln_f"), "lm_head")


class GptNeoX(DenseModel):
    """GPT-NeoX: half pairs, partial rotary, query, key and value fused per head."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = self.num_kv_heads = config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.num_heads
        rope = config["rope_parameters"]
        rotary_dim = int(self.head_dim * rope["partial_rotary_factor"])
        inv_freq = default_inv_freq(rope["rope_theta"], rotary_dim)
        self.rotary = DenseRotary(inv_freq, rotary_dim, interleaved=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weights["gpt_neox.embed_in.weight"][tokens]

    def project(self, layer_idx: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layer = f"gpt_neox.layers.{layer_idx}"
        x = self.layer_norm(x, f"{layer}.input_layernorm")
        fused = self.linear(x, f"{layer}.attention.query_key_value")
        query, key, value = fused.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(-2)
        return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"gpt_neox.layers.{layer_idx}"
        inner = self.layer_norm(x, f"{layer}.post_attention_layernorm")
        inner = functional.gelu(self.linear(inner, f"{layer}.mlp.dense_h_to_4h"))
        attended = self.linear(attended, f"{layer}.attention.dense")
        return x + attended + self.linear(inner, f"{layer}.mlp.dense_4h_to_h")

    def logits(self, x: Tensor) -> Tensor:
        return self.linear(self.layer_norm(x, "gpt_neox.final_layer_norm"), "embed_out")


FAMILIES: dict[str, type[DenseModel]] = {
    "qwen3": LlamaLike,
    "llama": LlamaLike,
    "gptj": GptJ,
    "gpt_neox": GptNeoX,
}
