"""In the place of the package flashinfer, which needs a GPU to be installed for: the names that
vLLM's backend imports, and wrappers that remember how they were planned."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import torch


class _Wrapper:
    """Remembers the arguments of ``plan``, those in host memory as lists."""

    plans: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, *_: Any, use_cuda_graph: bool = False, **__: Any) -> None:
        self.is_cuda_graph_enabled = use_cuda_graph

    def plan(self, **arguments: Any) -> None:
        listed = {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        self.plans.append((type(self).__name__, listed))


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    pass


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    pass


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    pass


class BatchAttentionWithAttentionSinkWrapper(_Wrapper):
    pass


def get_seq_lens(indptr: torch.Tensor, last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Tokens of each request: flashinfer's own definition of its page metadata."""
    num_pages = indptr[1:] - indptr[:-1]
    return torch.clamp(num_pages - 1, min=0) * page_size + last_page_len


def fast_decode_plan(wrapper: _Wrapper, **arguments: Any) -> None:
    """The plan of a captured batch size that was planned before."""
    wrapper.plan(**arguments)


def _absent(*_: Any, **__: Any) -> None:
    raise AssertionError("no attention is computed here")


def _other_name(name: str) -> type:
    """What another release of vLLM imports and no test here calls."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})


def install() -> list[tuple[str, dict[str, Any]]]:
    """Make ``import flashinfer`` find this; returns the list that plans are appended to."""
    package, decode, prefill, utils = (
        ModuleType(name)
        for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils")
    )
    for kind in (
        BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper,
        BatchPrefillWithRaggedKVCacheWrapper,
        BatchAttentionWithAttentionSinkWrapper,
    ):
        setattr(package, kind.__name__, kind)
    package.get_seq_lens = get_seq_lens
    package.nvfp4_quantize_append_paged_kv_cache_with_slot_mapping = _absent
    decode.fast_decode_plan = fast_decode_plan
    decode.trtllm_batch_decode_with_kv_cache = _absent
    decode._get_range_buf = lambda length, device: torch.arange(length, device=device)
    prefill.trtllm_batch_context_with_kv_cache = _absent
    utils.FP4Tensor = object
    for module in (package, decode, prefill, utils):
        module.__getattr__ = _other_name
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    return _Wrapper.plans


@contextmanager
def installed() -> Iterator[None]:
    """Inside, ``import flashinfer`` finds this. Not where the package itself is there."""
    if importlib.util.find_spec("flashinfer") is not None:
        yield
        return
    install()
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
        del sys.modules[name]
