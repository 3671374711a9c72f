"""What an engine on the CPU is told before it starts."""

from typing import Any

import torch


def keep_async_scheduling() -> None:
    """vLLM's CPU platform switches async scheduling off behind the flags; put it back on."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def start_amx() -> None:
    """Where there is AMX: a first batch of one bfloat16 token may be an illegal instruction."""
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
