"""Draft models for the tiny target: near copies of it, other heads, EAGLE heads, an MTP layer."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

SHARED = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")


def write_near_copy(folder: Path, target: Path) -> Path:
    """The target with noise on its projections: most of its proposals are right."""
    shutil.copytree(target, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(9)
    for name, weight in sorted(weights.items()):
        if weight.dim() == 2 and name not in SHARED:
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
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


def write_eagle3_head(folder: Path, target: Path) -> Path:
    """EAGLE3: ``fc`` makes one state out of those behind three layers of the target, and the only
    layer attends from ``[embedding, state]``; it has an output matrix over a vocabulary of its own.
    Here ``fc`` passes the last state, the layer is the target's last one, and the vocabulary is
    every token but the first sixteen."""
    folder.mkdir()
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    size, num_left_out = config["hidden_size"], 16
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    weights = load_file(target / "model.safetensors")
    head = {
        name.replace(last, "midlayer."): weight
        for name, weight in weights.items()
        if name.startswith(last)
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        own = head[f"midlayer.self_attn.{name}.weight"]
        head[f"midlayer.self_attn.{name}.weight"] = torch.cat([0.3 * own, 0.7 * own], 1)
    head |= {
        "fc.weight": torch.cat([torch.zeros(size, 2 * size), torch.eye(size)], 1),
        "midlayer.hidden_norm.weight": torch.ones(size),
        "norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"][num_left_out:].clone(),
        "d2t": torch.full((config["vocab_size"] - num_left_out,), num_left_out),
    }
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"] - num_left_out,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_mimo(folder: Path, llama: Path) -> Path:
    """A MiMo model that computes what ``llama`` does, with one layer for multi-token prediction
    (MTP) behind ``input_proj [hidden state, embedding]``; here that is the model's last layer."""
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    size, own = config["hidden_size"], "model.mtp_layers.0."
    weights |= {
        name.replace(last, own): weight.clone()
        for name, weight in weights.items()
        if name.startswith(last)
    }
    with_bias = [name for name in weights if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")]
    weights |= {
        name.replace("weight", "bias"): torch.zeros(len(weights[name])) for name in with_bias
    }
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{own}{name}.weight"] = torch.ones(size)
    identity = torch.eye(size)
    weights[own + "input_proj.weight"] = torch.cat([0.7 * identity, 0.3 * identity], 1)
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
