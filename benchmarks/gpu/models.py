"""Shapes of the models whose engines are measured, with dummy weights: real speed and memory, no
text.
"""

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
VOCAB_SIZE = 151_936


@dataclass(frozen=True)
class Shape:
    """A dense Qwen3 model. bits: of the weights of its linear layers, 16 (bf16) or 4 (GPTQ)."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 8
    head_dim: int = 128
    bits: int = 16

    @property
    def config(self) -> Json:
        """What ``config.json`` holds."""
        quantised = {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": self.bits,
                "group_size": 128,
                "desc_act": False,
                "sym": True,
            }
        }
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 40_960,
            "rope_theta": 1_000_000,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 151_645,
        } | (quantised if self.bits < 16 else {})

    @property
    def token_bytes(self) -> int:
        """KV cache of one token in bf16."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2

    @property
    def weight_bytes(self) -> int:
        """Embedding and output matrix in bf16; attention and MLP, with a scale for 128 weights
        where they have few bits."""
        rows = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        linear = self.num_layers * self.hidden_size * (rows + 3 * self.intermediate_size)
        scales = 0 if self.bits == 16 else 2 * linear // 128
        return 4 * VOCAB_SIZE * self.hidden_size + linear * self.bits // 8 + scales


QWEN3_8B = Shape("Qwen3-8B", 4096, 12_288, 36, 32)
QWEN3_32B_4BIT = Shape("Qwen3-32B, 4 bits", 5120, 25_600, 64, 64, bits=4)
