"""vLLM's workers, with statistics at start-up and rounds before each step that planned some."""

from typing import cast

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.parallel_state import get_world_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.worker_base import CompilationTimes

from triattention_vllm.config import Settings
from triattention_vllm.engine.attention import override_backends
from triattention_vllm.engine.refusals import refuse_unsupported_layers
from triattention_vllm.engine.rounds import GroupRounds, group_rounds
from triattention_vllm.engine.rows import write_row_v1
from triattention_vllm.engine.scheduler import RoundsSchedulerOutput
from triattention_vllm.engine.settings import settings_of
from triattention_vllm.engine.spec import CompressedAttentionSpec, compressed_specs
from triattention_vllm.engine.startup import startup_line
from triattention_vllm.engine.statistics_source import StatisticsSource
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.log import logger


class CompressionCPUWorker(CPUWorker):
    """``CPUWorker`` that compresses."""

    def __init__(self, vllm_config: VllmConfig, *args: object, **kwargs: object) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        if torch.cpu._is_amx_tile_supported():
            # vLLM skips its warm-up in eager mode, and a first batch of one bfloat16 token then
            # ends in an illegal instruction.
            torch.cpu._init_amx()
        settings = settings_of(vllm_config)
        assert settings is not None, "this worker is chosen only where compression is on"
        self.settings: Settings = settings
        self.rounds: dict[int, GroupRounds] = {}

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model on our attention backends, then its statistics if there are any.

        A statistics file that is wrong is an error here, long before the server is ready.
        """
        override_backends()
        super().load_model(load_dummy_weights=load_dummy_weights)
        specs = self.get_kv_cache_spec()
        names = [n for n, spec in specs.items() if isinstance(spec, CompressedAttentionSpec)]
        layers = self.vllm_config.compilation_config.static_forward_context
        refuse_unsupported_layers({name: layers[name] for name in names})
        self.statistics_source = StatisticsSource(self, names, self.settings)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, with ours in the place of plain full attention."""
        in_flight = self.vllm_config.max_in_flight_tokens + self.vllm_config.num_lookahead_tokens
        return compressed_specs(super().get_kv_cache_spec(), self.settings, in_flight)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache."""
        super().initialize_from_config(kv_cache_config)
        self.kv_cache_config = kv_cache_config

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up, then make the statistics if no file had them, and say what is on."""
        times = super().compile_or_warm_up_model()
        statistics = self.statistics_source.ready(self.kv_cache_config)
        for group_id, group in enumerate(self.kv_cache_config.kv_cache_groups):
            if not isinstance(group.kv_cache_spec, CompressedAttentionSpec):
                continue
            if not group.layer_names:
                continue  # this pipeline stage has no layer of the group
            layers = self.vllm_config.compilation_config.static_forward_context
            num_heads = layers[group.layer_names[0]].num_heads
            self.rounds[group_id] = group_rounds(
                group,
                layers,
                statistics,
                self.statistics_source.rotary_of(group.layer_names),
                get_tensor_model_parallel_rank() * num_heads,
                self.settings,
            )
        if get_world_group().rank_in_group == 0:
            logger.info(
                startup_line(
                    self.vllm_config,
                    self.kv_cache_config,
                    self.settings,
                    self.statistics_source.description,
                )
            )
        return times

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | AsyncModelRunnerOutput | None:
        """Carry out this step's rounds, then vLLM's step.

        The forward pass, zeroing and copy-on-write all come after, so blocks that a round
        freed, and that another request may already hold, still have their tokens here.
        """
        if isinstance(scheduler_output, RoundsSchedulerOutput):
            for plan in scheduler_output.round_plans:
                self.rounds[plan.group_id].run(plan)
                write_row_v1(self.model_runner, plan)
        return cast(
            "ModelRunnerOutput | AsyncModelRunnerOutput | None",
            super().execute_model(scheduler_output),
        )


WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": f"{__name__}.CompressionCPUWorker",
}
"""vLLM's worker class -> ours."""


def compression_worker_class(worker_cls: str) -> str:
    """Our worker in the place of the one that vLLM resolved for the platform."""
    if worker_cls not in WORKERS:
        raise UnsupportedError(
            f"KV compression has no worker for {worker_cls!r}; it runs with {sorted(WORKERS)}; "
            "leave --worker-cls unset, or start without --kv-compression"
        )
    return WORKERS[worker_cls]
