"""Decoder families with layers of several kinds, in float64: windows, sinks, experts, no rotation,
linear attention. Written from their definitions, like ``dense_models``."""

import torch
from dense_models import (
    NO_ROTATION,
    DenseModel,
    DenseRotary,
    Json,
    LlamaLike,
    default_inv_freq,
    rms_norm,
    yarn_inv_freq,
)
from torch import Tensor
from torch.nn import functional


class SmolLM3(LlamaLike):
    """Llama with layers that do not rotate."""

    def rotary_of(self, layer_idx: int) -> DenseRotary:
        return self.rotary if self.config["no_rope_layers"][layer_idx] else NO_ROTATION


class Gemma3(LlamaLike):
    """Sliding windows with a rotation of their own between full layers; four norms a layer, all of
    them ``1 + weight``; scaled embeddings; output matrix tied."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        rope = config["rope_parameters"]
        super().__init__({**config, "rope_parameters": rope["full_attention"]}, weights)
        local = default_inv_freq(rope["sliding_attention"]["rope_theta"], self.head_dim)
        self.local_rotary = DenseRotary(local, self.head_dim, interleaved=False)

    @property
    def scale(self) -> float:
        return float(self.config["query_pre_attn_scalar"] ** -0.5)

    def window_of(self, layer_idx: int) -> int | None:
        is_sliding = self.config["layer_types"][layer_idx] == "sliding_attention"
        return int(self.config["sliding_window"]) if is_sliding else None

    def rotary_of(self, layer_idx: int) -> DenseRotary:
        return self.rotary if self.window_of(layer_idx) is None else self.local_rotary

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, 1 + self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) * self.config["hidden_size"] ** 0.5

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"model.layers.{layer_idx}"
        attended = self.linear(attended, f"{layer}.self_attn.o_proj")
        x = x + self.norm(attended, f"{layer}.post_attention_layernorm")
        inner = self.norm(x, f"{layer}.pre_feedforward_layernorm")
        gate = self.linear(inner, f"{layer}.mlp.gate_proj")
        up = self.linear(inner, f"{layer}.mlp.up_proj")
        hidden = functional.gelu(gate, approximate="tanh") * up
        out = self.linear(hidden, f"{layer}.mlp.down_proj")
        return x + self.norm(out, f"{layer}.post_feedforward_layernorm")

    def logits(self, x: Tensor) -> Tensor:
        return functional.linear(
            self.norm(x, "model.norm"), self.weights["model.embed_tokens.weight"]
        )


class GptOss(LlamaLike):
    """Windows in every other layer, learned sinks, YaRN, biases, experts with a clamped gate."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        rope = config["rope_parameters"]
        super().__init__({**config, "rope_parameters": {**rope, "rope_type": "default"}}, weights)
        inv_freq, factor = yarn_inv_freq(self.rotary.inv_freq, rope, self.head_dim)
        self.rotary = DenseRotary(inv_freq, self.head_dim, interleaved=False, factor=factor)

    def window_of(self, layer_idx: int) -> int | None:
        return int(self.config["sliding_window"]) if layer_idx % 2 == 0 else None

    def sinks_of(self, layer_idx: int) -> Tensor | None:
        return self.weights[f"model.layers.{layer_idx}.self_attn.sinks"]

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"model.layers.{layer_idx}"
        x = x + self.linear(attended, f"{layer}.self_attn.o_proj")
        inner = self.norm(x, f"{layer}.post_attention_layernorm")
        router = self.linear(inner, f"{layer}.mlp.router")
        best = router.topk(self.config["num_experts_per_tok"])
        share = torch.zeros_like(router).scatter_(1, best.indices, best.values.softmax(-1))
        experts = f"{layer}.mlp.experts"
        up = torch.einsum("nd,edf->enf", inner, self.weights[f"{experts}.gate_up_proj"])
        up = up + self.weights[f"{experts}.gate_up_proj_bias"].unsqueeze(1)
        # A constant, which the configuration names since transformers 5.18.
        limit = self.config.get("swiglu_limit", 7.0)
        gate, up = up[..., ::2].clamp(max=limit), up[..., 1::2].clamp(-limit, limit)
        hidden = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        down = torch.einsum("enf,efd->end", hidden, self.weights[f"{experts}.down_proj"])
        down = down + self.weights[f"{experts}.down_proj_bias"].unsqueeze(1)
        return x + torch.einsum("ne,end->nd", share, down)


class Qwen3Next(LlamaLike):
    """Gated delta rule between gated full attention layers; a quarter of the head rotated; experts
    and a shared one; norms ``1 + weight``."""

    def __init__(self, config: Json, weights: dict[str, Tensor]) -> None:
        super().__init__(config, weights)
        rope = config["rope_parameters"]
        rotary_dim = int(self.head_dim * rope["partial_rotary_factor"])
        inv_freq = default_inv_freq(rope["rope_theta"], rotary_dim)
        self.rotary = DenseRotary(inv_freq, rotary_dim, interleaved=False)

    @property
    def attention_layers(self) -> list[int]:
        types = self.config["layer_types"]
        return [i for i in range(self.num_layers) if types[i] == "full_attention"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, 1 + self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def project(self, layer_idx: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = f"model.layers.{layer_idx}.self_attn"
        x = self.norm(x, f"model.layers.{layer_idx}.input_layernorm")
        query = self.linear(x, f"{attention}.q_proj").unflatten(-1, (self.num_heads, 2, -1))
        key, value = (self.heads(self.linear(x, f"{attention}.{name}_proj")) for name in "kv")
        query = self.norm(query[:, :, 0].transpose(0, 1), f"{attention}.q_norm")
        return query, self.norm(key, f"{attention}.k_norm"), value

    def gate(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"model.layers.{layer_idx}"
        x = self.norm(x, f"{layer}.input_layernorm")
        query = self.linear(x, f"{layer}.self_attn.q_proj").unflatten(-1, (self.num_heads, 2, -1))
        return attended * torch.sigmoid(query[:, :, 1].flatten(1))

    def mix(
        self, layer_idx: int, x: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        config, layer = self.config, f"model.layers.{layer_idx}.linear_attn"
        x = self.norm(x, f"model.layers.{layer_idx}.input_layernorm")
        num_k, num_v = config["linear_num_key_heads"], config["linear_num_value_heads"]
        size_k, size_v = config["linear_key_head_dim"], config["linear_value_head_dim"]
        group = num_v // num_k
        sizes = [size_k, size_k, group * size_v, group * size_v]
        fused = self.linear(x, f"{layer}.in_proj_qkvz").unflatten(-1, (num_k, -1))
        query, key, value, z = (part.flatten(1) for part in fused.split(sizes, -1))
        strength = self.linear(x, f"{layer}.in_proj_ba").unflatten(-1, (num_k, -1))
        beta, step = (part.flatten(1) for part in strength.split([group, group], -1))
        mixed = torch.cat([query, key, value], -1)
        weight = self.weights[f"{layer}.conv1d.weight"]
        earlier = mixed.new_zeros(weight.shape[-1] - 1, mixed.shape[1])
        memory = mixed.new_zeros(num_v, size_k, size_v)
        if state is not None:
            earlier, memory = state
        mixed = torch.cat([earlier, mixed])
        earlier = mixed[len(x) :]
        mixed = functional.silu(causal_conv(mixed, weight))
        query, key, value = mixed.split([num_k * size_k, num_k * size_k, num_v * size_v], -1)
        decay = -self.weights[f"{layer}.A_log"].exp() * functional.softplus(
            step + self.weights[f"{layer}.dt_bias"]
        )
        out, memory = delta_rule(
            unit(query.unflatten(-1, (num_k, -1))).repeat_interleave(group, 1) / size_k**0.5,
            unit(key.unflatten(-1, (num_k, -1))).repeat_interleave(group, 1),
            value.unflatten(-1, (num_v, -1)),
            decay.exp(),
            beta.sigmoid(),
            memory,
        )
        out = rms_norm(out, self.weights[f"{layer}.norm.weight"], config["rms_norm_eps"])
        gated = out * functional.silu(z.unflatten(-1, (num_v, -1)))
        return gated.flatten(1), (earlier, memory)

    def finish_layer(self, layer_idx: int, x: Tensor, attended: Tensor) -> Tensor:
        layer = f"model.layers.{layer_idx}"
        is_attention = layer_idx in self.attention_layers
        part = "self_attn.o_proj" if is_attention else "linear_attn.out_proj"
        x = x + self.linear(attended, f"{layer}.{part}")
        inner = self.norm(x, f"{layer}.post_attention_layernorm")
        router = self.linear(inner, f"{layer}.mlp.gate").softmax(-1)
        best = router.topk(self.config["num_experts_per_tok"])
        share = torch.zeros_like(router)
        share.scatter_(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        out = torch.sigmoid(self.linear(inner, f"{layer}.mlp.shared_expert_gate"))
        out = out * self._mlp(inner, f"{layer}.mlp.shared_expert")
        for expert in range(router.shape[1]):
            own = self._mlp(inner, f"{layer}.mlp.experts.{expert}")
            out = out + share[:, expert : expert + 1] * own
        return x + out

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        gate = functional.silu(self.linear(x, f"{name}.gate_proj"))
        return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel by itself: ``y_t = sum_j weight[c, 0, j] x_{t + j}``, x [size - 1 + n, c], of
    which the first size - 1 rows came before; returns [n, c]."""
    return functional.conv1d(x.T.unsqueeze(0), weight, groups=x.shape[1])[0].T


def unit(x: Tensor) -> Tensor:
    """``x / sqrt(|x|^2 + 1e-6)`` over the last dim."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """``S <- decay S``, ``S <- S + beta k (v - S^T k)^T``, output ``S^T q``; token by token.

    query, key [n, H, K]; value [n, H, V]; decay, beta [n, H]; state [H, K, V]. Returns the
    outputs [n, H, V] and the state behind the last token.
    """
    outputs = []
    for q, k, v, forget, gain in zip(query, key, value, decay, beta, strict=True):
        state = state * forget[:, None, None]
        error = (v - torch.einsum("hkv,hk->hv", state, k)) * gain[:, None]
        state = state + k.unsqueeze(-1) * error.unsqueeze(1)
        outputs.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(outputs), state


HYBRIDS: dict[str, type[DenseModel]] = {
    "gemma3_text": Gemma3,
    "gpt_oss": GptOss,
    "qwen3_next": Qwen3Next,
    "smollm3": SmolLM3,
}
