"""Draft models for the tiny target: near copies of it, other heads, and an EAGLE head."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from triattention_vllm.tools.tiny_model import write_tiny_model

SHARED = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


def write_near_copy(folder: Path, target: Path, noise: float = 0.1) -> Path:
    """The target with noise on its projections: most of its proposals are right."""
    shutil.copytree(target, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, weight in sorted(weights.items()):
        if weight.dim() == 2 and name not in SHARED:
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_other_heads(folder: Path, target: Path) -> Path:
    """One layer with heads of its own size and number, between the target's embeddings."""
    write_tiny_model(folder, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32)
    weights, shared = (load_file(path / "model.safetensors") for path in (folder, target))
    weights |= {name: shared[name] for name in SHARED}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_eagle_head(folder: Path, target: Path) -> Path:
    """EAGLE: one layer of a Llama target behind ``fc [embedding, hidden state]``; embeddings and
    output matrix are the target's. Here ``fc`` passes the hidden state and the layer is the
    target's last one."""
    folder.mkdir()
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = {
        name.replace(last, "layers.0."): weight
        for name, weight in load_file(target / "model.safetensors").items()
        if name.startswith(last) and "input_layernorm" not in name
    }
    identity = torch.eye(config["hidden_size"])
    weights["fc.weight"] = torch.cat([0.3 * identity, 0.7 * identity], 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
