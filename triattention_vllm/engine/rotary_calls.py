"""Whether an attention module rotates its queries, where its class does so only for some layers.

Models with NoPE layers often build a rotary module for every layer and skip the call for some.
The conditions of all models of vLLM are listed here, word for word; a class with a condition
that is not listed is refused rather than guessed.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from triattention_vllm.errors import UnsupportedError

CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "self.use_rope": lambda layer: bool(layer.use_rope),
    "self._use_rope": lambda layer: bool(layer._use_rope),
    "self.use_rotary": lambda layer: bool(layer.use_rotary),
    "self.rotary_emb is not None": lambda layer: layer.rotary_emb is not None,
    "self.v1 or self.sliding_window": lambda layer: bool(layer.v1 or layer.sliding_window),
    "self.sliding_window or self.force_rope": lambda layer: bool(
        layer.sliding_window or layer.force_rope
    ),
    "self.sliding_window or self.apply_rope_all_layers": lambda layer: bool(
        layer.sliding_window or layer.apply_rope_all_layers
    ),
    "self.sliding_window_size or self.apply_rope_all_layers": lambda layer: bool(
        layer.sliding_window_size or layer.apply_rope_all_layers
    ),
    "self.is_local_attention and self.rotary_emb is not None": lambda layer: bool(
        layer.is_local_attention and layer.rotary_emb is not None
    ),
    "self.config.use_mem_rope": lambda layer: bool(layer.config.use_mem_rope),
    "not (self.hpc_rope_norm is not None)": lambda layer: True,
    "self.use_fused_qk_norm_rope_gate": lambda layer: True,
}
"""Condition in the source -> does this layer rotate. The one with ``sliding_window_size`` is
EXAONE-MoE's through vLLM 0.31. The last two (HunYuan V3, Qwen3-Next) choose between a fused and a
plain rotation."""

_CALLS = ("self.rotary_emb", "self.rotary_pos_emb", "apply_rotary_pos_emb")


def rotates_its_queries(owner: nn.Module) -> bool:
    """Whether ``owner``, which holds or is given a rotary embedding, applies it to its queries.

    Raises UnsupportedError for a condition that is not in CONDITIONS.
    """
    for condition in rotary_conditions(type(owner)):
        if condition not in CONDITIONS:
            raise UnsupportedError(
                f"{type(owner).__name__} rotates its queries only if {condition!r}, which KV "
                "compression does not know; serve this model without it"
            )
        if not CONDITIONS[condition](owner):
            return False
    return True


def rotary_conditions(cls: type) -> list[str]:
    """Conditions, as in the source, around the rotary calls of an attention class.

    An ``if`` whose two branches both rotate is no condition.
    """
    found: list[str] = []
    seen: set[str] = set()
    for klass in cls.__mro__:
        if klass in (nn.Module, object):
            continue
        for name, member in vars(klass).items():
            if name in seen or name == "__init__" or not inspect.isfunction(member):
                continue
            seen.add(name)
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(member))))
            found += conditions_in(tree)
    return sorted(set(found))


def conditions_in(node: ast.AST) -> Iterator[str]:
    """The same for a part of the source."""
    if isinstance(node, ast.If):
        taken, other = (any(map(_rotates, branch)) for branch in (node.body, node.orelse))
        if taken and not other:
            yield ast.unparse(node.test)
        if other and not taken:
            yield f"not ({ast.unparse(node.test)})"
    for child in ast.iter_child_nodes(node):
        yield from conditions_in(child)


def _rotates(node: ast.AST) -> bool:
    return any(
        isinstance(call, ast.Call)
        and (
            ast.unparse(call.func) in _CALLS
            or any(ast.unparse(argument) in _CALLS for argument in call.args)
        )
        for call in ast.walk(node)
    )
