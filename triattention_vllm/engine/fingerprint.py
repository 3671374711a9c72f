"""Which model is running, described the same for every parallel layout, dtype and platform."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import extract_layer_index

from triattention_vllm.engine.ranks import gather_from_all_ranks, is_first_rank
from triattention_vllm.engine.rotary import attention_owners
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint

_NUM_EMBEDDING_ROWS = 64
_NUM_NORMS = 2


def model_fingerprint(
    vllm_config: VllmConfig, model: nn.Module, layer_names: Sequence[str], rotary: Rotary
) -> Fingerprint:
    """The fingerprint of the whole model, equal on every rank. Collective: all ranks call it.

    layer_names: this rank's compressed attention layers; rotary: their parameters, same order.
    Raises UnsupportedError where these layers differ in heads or head dim.
    """
    num_heads, num_kv_heads, head_dim = _geometry(vllm_config, model, layer_names)
    indices = [extract_layer_index(name) for name in layer_names]
    own_hash = weights_hash(vllm_config, model) if is_first_rank() else None
    parts = gather_from_all_ranks((indices, rotary, own_hash))
    layer_indices, whole = _whole_rotary([(indices, rotary) for indices, rotary, _ in parts])
    return Fingerprint(
        architecture=vllm_config.model_config.architecture,
        layer_indices=layer_indices,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dims=whole.rotary_dims,
        interleaved=whole.interleaved,
        inv_freq_hash=whole.inv_freq_hash(),
        weights_hash=parts[0][2],
    )


def weights_hash(vllm_config: VllmConfig, model: nn.Module) -> str | None:
    """SHA-256 over some weights of rank 0, rounded to bfloat16; None if none of them is there.

    Embedding rows and norm weights only: every tensor- and pipeline-parallel layout has them
    whole on rank 0, quantised checkpoints keep them, and no platform packs them, while
    projections are split, quantised or (on CPU) packed.
    """
    digest = hashlib.sha256()
    hidden_size = vllm_config.model_config.get_hidden_size()
    num_hashed = 0
    for tensor in (*_embedding_rows(model), *_norm_weights(model, hidden_size)):
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
        num_hashed += 1
    return digest.hexdigest() if num_hashed else None


def _whole_rotary(parts: Sequence[tuple[list[int], Rotary]]) -> tuple[tuple[int, ...], Rotary]:
    """Decoder layer indices, ascending, and parameters of all layers, from every rank's own."""
    pairings = {rotary.interleaved for _, rotary in parts if any(rotary.rotary_dims)}
    if len(pairings) > 1:
        raise UnsupportedError(
            "pipeline stages pair their rotary dims differently; KV compression needs one pairing "
            "for all layers, serve this model without it"
        )
    places = {
        layer_idx: (rotary, row)
        for indices, rotary in parts
        for row, layer_idx in enumerate(indices)
    }
    layer_indices = tuple(sorted(places))
    num_frequencies = max(rotary.num_frequencies for _, rotary in parts)
    inv_freq = torch.zeros(len(layer_indices), num_frequencies, dtype=torch.float64)
    attention_factor = torch.ones(len(layer_indices), dtype=torch.float64)
    rotary_dims = []
    for whole_row, layer_idx in enumerate(layer_indices):
        rotary, row = places[layer_idx]
        rotary_dims.append(rotary.rotary_dims[row])
        inv_freq[whole_row, : rotary.num_frequencies] = rotary.inv_freq[row]
        attention_factor[whole_row] = rotary.attention_factor[row]
    whole = Rotary(inv_freq, attention_factor, tuple(rotary_dims), pairings == {True})
    return layer_indices, whole


def _geometry(
    vllm_config: VllmConfig, model: nn.Module, layer_names: Sequence[str]
) -> tuple[int, int, int]:
    """Query heads, KV heads and head dim of the whole model's compressed layers."""
    owners = attention_owners(model)
    found = {_layer_geometry(vllm_config, *owners[name]) for name in layer_names}
    if len(found) != 1:
        raise UnsupportedError(
            f"the compressed attention layers have (query heads, KV heads, head dim) "
            f"{sorted(found)}; KV compression needs them to agree, serve this model without it"
        )
    return found.pop()


def _layer_geometry(
    vllm_config: VllmConfig, owner: nn.Module, attention: Attention
) -> tuple[int, int, int]:
    """A layer's totals over all tensor-parallel ranks (KV heads may be replicated on some)."""
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    num_heads = int(attention.num_heads) * num_ranks
    for child in owner.children():
        if isinstance(child, QKVParallelLinear):
            return num_heads, int(child.total_num_kv_heads), int(attention.head_size)
    total = vllm_config.model_config.get_total_num_kv_heads()
    return num_heads, total, int(attention.head_size)


def _embedding_rows(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            for name, weight in module.named_parameters(recurse=False):
                if name == "weight" and weight.is_floating_point() and weight.itemsize > 1:
                    yield weight[:_NUM_EMBEDDING_ROWS]
                    return


def _norm_weights(model: nn.Module, hidden_size: int) -> Iterator[Tensor]:
    """The first norms in the order of the model: those of the first decoder layer."""
    num_found = 0
    for name, weight in model.named_parameters():
        if name.endswith("weight") and list(weight.shape) == [hidden_size]:
            yield weight
            num_found += 1
            if num_found == _NUM_NORMS:
                return
