"""What the worker processes of one engine tell each other at start-up."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from vllm.distributed.parallel_state import get_world_group

from triattention_vllm.errors import StatisticsError, TriAttentionError

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this is global rank 0, the one that reads and writes files."""
    return bool(get_world_group().rank_in_group == 0)


def gather_from_all_ranks(value: T) -> list[T]:
    """``value`` of every rank, in rank order, on every rank. Collective; values are pickled."""
    world = get_world_group()
    if world.world_size == 1:
        return [value]
    gathered: list[T | None] = [None] * world.world_size
    torch.distributed.all_gather_object(gathered, value, group=world.cpu_group)
    return cast(list[T], gathered)


def from_first_rank(value: T) -> T:
    """``value`` of global rank 0, on every rank. Collective; the value is pickled."""
    world = get_world_group()
    if world.world_size == 1:
        return value
    received: T = world.broadcast_object(value, src=0)
    return received


def on_first_rank(read: Callable[[], T]) -> T:
    """What ``read`` returns on global rank 0, on every rank; its StatisticsError likewise."""
    outcome: list[T] | StatisticsError = []
    if is_first_rank():
        try:
            outcome = [read()]
        except StatisticsError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, StatisticsError):
        raise outcome
    return outcome[0]


def of_all_ranks(own: T | TriAttentionError) -> list[T]:
    """``own`` of every rank, in rank order, on every rank; an error of one is raised on all."""
    values: list[T] = []
    for value in gather_from_all_ranks(own):
        if isinstance(value, TriAttentionError):
            raise value
        values.append(value)
    return values
