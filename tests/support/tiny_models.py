"""Random-weight models of other families, built from transformers' own configurations.

Same character as ``write_tiny_model``: embeddings share a direction, attention is not flat.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_model import concentrated_embeddings, write_tokenizer
from transformers import PretrainedConfig

VOCAB_SIZE = 320
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def llama3_config() -> PretrainedConfig:
    """Grouped queries, llama3 frequencies (waves on all three sides of the ramp)."""
    return transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=8192,
        rope_parameters=dict(LLAMA3_SCALING),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=258,
    )


def gptj_config() -> PretrainedConfig:
    """Interleaved pairs, half of the head rotated, no grouping."""
    return transformers.GPTJConfig(
        n_embd=128,
        n_layer=3,
        n_head=4,
        n_positions=8192,
        rotary_dim=16,
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=258,
        tie_word_embeddings=False,
    )


def gpt_neox_config() -> PretrainedConfig:
    """Half pairs, a quarter of the head rotated, biases everywhere."""
    return transformers.GPTNeoXConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=8192,
        vocab_size=VOCAB_SIZE,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        bos_token_id=None,
        eos_token_id=258,
        tie_word_embeddings=False,
    )


COMMON = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": 258,
    "tie_word_embeddings": False,
}


def gemma3_config() -> PretrainedConfig:
    """Windows of 64 tokens, and twice as many full layers: these fill two KV-cache groups."""
    layer_types = ["sliding_attention", "full_attention", "full_attention"] * 2
    return transformers.Gemma3TextConfig(
        **{**COMMON, "tie_word_embeddings": True},
        num_hidden_layers=6,
        sliding_window=64,
        layer_types=layer_types,
        query_pre_attn_scalar=32,
    )


def gpt_oss_config() -> PretrainedConfig:
    """Windows in every other layer, learned sinks, YaRN, experts."""
    return transformers.GptOssConfig(
        **COMMON,
        num_hidden_layers=4,
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        },
    )


def smollm3_config() -> PretrainedConfig:
    """Two layers that rotate, then one that does not, then one that does."""
    return transformers.SmolLM3Config(
        **COMMON,
        num_hidden_layers=4,
        no_rope_layers=[1, 1, 0, 1],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=257,
    )


def qwen3_next_config() -> PretrainedConfig:
    """Linear attention and gated full attention, a quarter of the head rotated, experts.

    vLLM makes blocks as large as a linear state: the more heads, the fewer tokens, here 128. Its
    CPU kernel computes in bfloat16, so all experts are chosen: rounding cannot change the route.
    """
    return transformers.Qwen3NextConfig(
        **{**COMMON, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128},
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        partial_rotary_factor=0.25,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=2,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )


def gemma3n_config() -> PretrainedConfig:
    """The last two layers read the caches of the first two, one of which has a window."""
    return transformers.Gemma3nTextConfig(
        **{**COMMON, "tie_word_embeddings": True, "pad_token_id": 257},
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size_per_layer_input=16,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )


def bloom_config() -> PretrainedConfig:
    """ALiBi: biases from token positions instead of a rotation."""
    return transformers.BloomConfig(
        hidden_size=128,
        n_layer=2,
        n_head=4,
        vocab_size=VOCAB_SIZE,
        bos_token_id=None,
        eos_token_id=258,
    )


CONFIGS = {
    "llama3": llama3_config,
    "gptj": gptj_config,
    "gpt_neox": gpt_neox_config,
    "bloom": bloom_config,
    "gemma3": gemma3_config,
    "gemma3n": gemma3n_config,
    "gpt_oss": gpt_oss_config,
    "smollm3": smollm3_config,
    "qwen3_next": qwen3_next_config,
}


def write_model(folder: str | Path, family: str) -> Path:
    """Write a model of ``family`` (a key of CONFIGS) with tokenizer; always the same bytes."""
    folder = Path(folder)
    config = CONFIGS[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * _gain(name) / parameter.shape[1] ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(torch.exp(0.1 * noise))
        embedding, lm_head = concentrated_embeddings(
            config.vocab_size, config.hidden_size, generator
        )
        model.get_input_embeddings().weight.copy_(embedding)
        if not config.tie_word_embeddings:
            model.get_output_embeddings().weight.copy_(lm_head)
    model.save_pretrained(folder)
    if family == "gemma3n":
        _add_unused_norms(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def _add_unused_norms(folder: Path) -> None:
    """Key norms of the layers that read another layer's cache: published checkpoints have them,
    vLLM 0.28 wants them, and transformers does not save them."""
    weights = load_file(folder / "model.safetensors")
    names = [name for name in weights if name.endswith("k_norm.weight")]
    for name in names:
        layer_idx = int(name.split(".")[-4])
        weights[name.replace(f".{layer_idx}.", f".{layer_idx + 2}.")] = weights[name].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _gain(name: str) -> float:
    """Standard deviation of a projection's output for inputs of unit variance."""
    if any(part in name for part in ("q_proj", "k_proj", "query_key_value")):
        return 1.7
    if any(part in name for part in ("down_proj", "fc_out", "dense_4h_to_h")):
        return 0.5
    return 0.9
