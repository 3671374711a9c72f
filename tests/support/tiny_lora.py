"""A random LoRA adapter for a tiny model, and the model with the adapter merged into it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4
SCALE = 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapter(model: Path, adapter: Path, merged: Path, *, seed: int = 0) -> None:
    """Write the adapter as PEFT does, and ``W + scale * B A`` for every target into ``merged``."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(model / "model.safetensors")
    deltas = {}
    for name, weight in weights.items():
        if not any(f"{target}.weight" in name for target in TARGETS):
            continue
        num_out, num_in = weight.shape
        down = torch.randn(RANK, num_in, generator=generator) / num_in**0.5
        up = 0.2 * torch.randn(num_out, RANK, generator=generator)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        deltas |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        weights[name] = weight + SCALE * (up.double() @ down.double()).to(weight.dtype)
    adapter.mkdir()
    save_file(deltas, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": int(RANK * SCALE),
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copytree(model, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
