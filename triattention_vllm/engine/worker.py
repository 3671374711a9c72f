"""vLLM's workers, with statistics at start-up and rounds before each step that planned some."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.utils.gpu_sync_debug import gpu_sync_allowed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from triattention_vllm.config import Settings
from triattention_vllm.engine.attention import BACKENDS, ShiftedRows, override_backends
from triattention_vllm.engine.differences import JIT_MONITOR_CAN_WAIT, with_one_allocation
from triattention_vllm.engine.drafts import draft_attention_groups, draft_layer_names
from triattention_vllm.engine.finite_check import refuse_nan
from triattention_vllm.engine.kv_layout import paged_kv
from triattention_vllm.engine.kv_manager import RoundPlan
from triattention_vllm.engine.metrics_file import metrics_file
from triattention_vllm.engine.null_heads import NullHeads
from triattention_vllm.engine.ranks import is_first_rank
from triattention_vllm.engine.refusals import layers_sharing_a_cache, refuse_unsupported_layers
from triattention_vllm.engine.round_time import RoundTime
from triattention_vllm.engine.rounds import (
    DraftRounds,
    Rounds,
    TargetRounds,
    runs,
    target_rounds,
)
from triattention_vllm.engine.rows import Rows, RowsV1, RowsV2
from triattention_vllm.engine.scheduler import RoundsSchedulerOutput
from triattention_vllm.engine.settings import settings_of
from triattention_vllm.engine.spec import (
    CompressedAttentionSpec,
    compressed_block_size,
    compressed_spec,
    compressed_specs,
    group_capacity,
)
from triattention_vllm.engine.startup import startup_line
from triattention_vllm.engine.statistics_source import StatisticsSource
from triattention_vllm.engine.trace import survivor_trace
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.log import logger
from triattention_vllm.metrics import ROUND_TIME

StepOutput: TypeAlias = ModelRunnerOutput | AsyncModelRunnerOutput | None


class CompressionWorker(Worker):
    """In front of a platform's worker: statistics at start-up, rounds before the steps."""

    def __init__(self, vllm_config: VllmConfig, *args: object, **kwargs: object) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        settings = settings_of(vllm_config)
        assert settings is not None, "this worker is chosen only where compression is on"
        self.settings: Settings = settings
        self.rounds: dict[int, TargetRounds] = {}
        self.draft_rounds: dict[int, DraftRounds] = {}
        self.null_heads: dict[int, NullHeads] = {}

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model on our attention backends, then its statistics if there are any.

        A statistics file that is wrong is an error here, long before the server is ready.
        """
        override_backends()
        super().load_model(load_dummy_weights=load_dummy_weights)
        specs = self.get_kv_cache_spec()
        names = [n for n, spec in specs.items() if isinstance(spec, CompressedAttentionSpec)]
        layers = self.vllm_config.compilation_config.static_forward_context
        self.drafts = draft_layer_names(self.vllm_config, self.get_model(), names)
        own = [name for name in names if name not in self.drafts]
        shared = layers_sharing_a_cache(layers, names)
        refuse_unsupported_layers({name: layers[name] for name in [*own, *shared]})
        if self.drafts:
            refuse_unsupported_layers({name: layers[name] for name in sorted(self.drafts)})
        self.compressed_layers = own
        self.statistics_source = (
            StatisticsSource(self, own, self.settings) if self.settings.needs_statistics else None
        )

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, in place; then say whether the statistics are of other weights."""
        super().reload_weights(*args, **kwargs)
        self._compare_weights()

    def finish_weight_update(self) -> None:
        """The end of vLLM's weight transfer, as ``reload_weights``."""
        super().finish_weight_update()
        self._compare_weights()

    def _compare_weights(self) -> None:
        if self.statistics_source is not None:
            self.statistics_source.warn_if_replaced()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, with ours in the place of plain full attention."""
        in_flight = self.vllm_config.max_in_flight_tokens + self.vllm_config.num_lookahead_tokens
        return compressed_specs(super().get_kv_cache_spec(), self.settings, in_flight)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache; tell the metadata builders where null heads are known."""
        compressed_block_size(kv_cache_config)  # refuses groups that differ
        kv_cache_config = with_one_allocation(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        self.kv_cache_config = kv_cache_config
        # One worker of each engine speaks for all of them.
        metrics = metrics_file(self.vllm_config, (ROUND_TIME,)) if self.rank == 0 else None
        self.round_time = RoundTime(metrics, self.device)
        runner = self.model_runner
        self.rows: Rows = RowsV2(runner) if self.use_v2_model_runner else RowsV1(runner)
        self._share_null_heads()

    def _share_null_heads(self) -> None:
        """Let every metadata builder, of draft models too, read what is known of null heads.

        Raises UnsupportedError for a backend of a compressed group that is none of ours.
        """
        runner = self.model_runner
        groups = itertools.chain(*runner.attn_groups, draft_attention_groups(runner))
        for group in groups:
            null_heads = self.null_heads.setdefault(
                group.kv_cache_group_id, NullHeads(group.kv_cache_spec.block_size)
            )
            null_heads.read_rows_with(self.rows.requests)
            for builder in group.metadata_builders:
                if isinstance(builder, ShiftedRows):
                    builder.null_heads = null_heads
                elif isinstance(group.kv_cache_spec, CompressedAttentionSpec):
                    raise UnsupportedError(
                        f"attention backend {group.backend.get_name()} reads rows without looking "
                        f"past their null head; choose one of {sorted(m.name for m in BACKENDS)} "
                        "with --attention-backend, or start without --kv-compression"
                    )

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Warm up, then make the statistics if no file had them, and say what is on.

        Raises UnsupportedError where the model computes NaN.
        """
        times = super().compile_or_warm_up_model()
        # Behind its own warm-up vLLM can be told to refuse steps that wait for the device.
        with gpu_sync_allowed():
            self._make_rounds()
        if is_first_rank():
            source = self.statistics_source
            logger.info(
                startup_line(
                    self.vllm_config,
                    self.kv_cache_config,
                    self.settings,
                    "none" if source is None else source.description,
                )
            )
        return times

    def _make_rounds(self) -> None:
        """The rounds of this rank's layers, and the statistics that they score with."""
        source = self.statistics_source
        if source is None or not source.has_to_be_made:
            refuse_nan(self, self.kv_cache_config, self.compressed_layers)
        whole = None if source is None else source.ready(self.kv_cache_config)
        layers = self.vllm_config.compilation_config.static_forward_context
        for group_id, group in enumerate(self.kv_cache_config.kv_cache_groups):
            spec = compressed_spec(group)
            if spec is None:
                continue
            own = [name for name in group.layer_names if name not in self.drafts]
            drafts = [layers[name] for name in group.layer_names if name in self.drafts]
            if own:
                statistics = None
                if source is not None and whole is not None:
                    statistics = (whole, source.rotary_of(own))
                self.rounds[group_id] = target_rounds(
                    [layers[name] for name in own],
                    spec.block_size,
                    statistics,
                    get_tensor_model_parallel_rank(),
                    self.settings,
                    self.vllm_config.model_config.max_model_len,
                )
                if self.rank == 0:
                    rounds = self.rounds[group_id]
                    rounds.trace = survivor_trace(
                        self.vllm_config, self.settings, rounds.kv.block_size
                    )
                self._observe_queries(group_id, own)
            if drafts:
                self.draft_rounds[group_id] = DraftRounds(
                    paged_kv(drafts, spec.block_size), spec.block_size
                )

    def _observe_queries(self, group_id: int, layer_names: Sequence[str]) -> None:
        """From now on show the queries of every step to a scorer that looks at them."""
        observations = self.rounds[group_id].observations
        if observations is None:
            return
        queries, rows, device = observations.queries, self.rows, self.device

        def read_rows() -> None:
            queries.read_rows(rows.requests(), device)

        for group in itertools.chain(*self.model_runner.attn_groups):
            if group.kv_cache_group_id == group_id:
                for builder in group.metadata_builders:
                    builder.row_reader = read_rows
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            layers[name].impl.query_observer = queries.observe

    def _begin_step(self, step: SchedulerOutput | None) -> None:
        """Tell what looks at queries which step runs next, if it is one of requests."""
        for rounds in self.rounds.values():
            if rounds.observations is not None:
                rounds.observations.begin_step(step)

    def execute_model(self, scheduler_output: SchedulerOutput) -> StepOutput:
        """Carry out this step's rounds, then vLLM's step.

        The forward pass, zeroing and copy-on-write all come after, so blocks that a round
        freed, and that another request may already hold, still have their tokens here.
        """
        self.round_time.read_finished()
        planned = isinstance(scheduler_output, RoundsSchedulerOutput)
        plans = scheduler_output.round_plans if planned else ()
        if plans:
            with self.round_time.measured(len(plans)):
                self._run_rounds(plans)
            self.rows.write(plans)
        self._begin_step(scheduler_output)
        null_heads = scheduler_output.null_heads if planned else {}
        for group_id, of_group in self.null_heads.items():
            of_group.begin_step(null_heads.get(group_id, {}))
        output: StepOutput = super().execute_model(scheduler_output)
        return output

    def kv_capacity(self) -> dict[str, int]:
        """What the pool holds of one request, for the API processes: ``Capacity`` as it travels."""
        return asdict(group_capacity(self.vllm_config, self.kv_cache_config))

    def _run_rounds(self, plans: Sequence[RoundPlan]) -> None:
        for run in runs(plans):
            for group_id, rounds in self.all_rounds():
                if group_id in run:
                    rounds.run(run[group_id])

    def all_rounds(self) -> Iterator[tuple[int, Rounds]]:
        """Group and rounds of this rank's layers, those of a draft model behind the others."""
        yield from self.rounds.items()
        yield from self.draft_rounds.items()

    def execute_dummy_batch(self) -> None:
        """vLLM's batch without requests, which other data-parallel ranks wait for."""
        self._begin_step(None)
        for null_heads in self.null_heads.values():
            null_heads.begin_step({})
        super().execute_dummy_batch()


class CompressionGPUWorker(CompressionWorker):
    """vLLM's CUDA worker that compresses; not yet run on a GPU."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Also run one round on the empty cache, so that no request waits for a compiler."""
        times = super().compile_or_warm_up_model()
        with gpu_sync_allowed():
            for group_id, rounds in self.all_rounds():
                spec = compressed_spec(self.kv_cache_config.kv_cache_groups[group_id])
                assert spec is not None, "only compressed groups have rounds"
                rounds.warm_up(group_id, spec.policy, self.kv_cache_config.num_blocks)
        if JIT_MONITOR_CAN_WAIT:
            super()._maybe_activate_jit_monitor()
        return times

    def _maybe_activate_jit_monitor(self) -> None:
        """Not where vLLM calls it: kernels of calibration and rounds are compiled behind that."""
