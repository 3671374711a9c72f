"""Requests that ask for a budget of their own, or for none: answered before they are scheduled.

A value that cannot be served is answered to its client. vLLM has no seam for that which also
answers a streaming request with a status, so two methods of its API side are wrapped: one that
every request passes, and one that is called before a stream begins. A value that reaches the
scheduler nevertheless is dropped there with a warning.
"""

from collections.abc import Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request

from triattention_vllm.config import Settings
from triattention_vllm.engine.settings import settings_of
from triattention_vllm.engine.versions import require_attributes
from triattention_vllm.errors import RequestError
from triattention_vllm.log import logger
from triattention_vllm.request import Capacity, RequestSettings, without_own_keys


def asked_by(params: SamplingParams | None) -> RequestSettings:
    """What a request asks for. Raises RequestError."""
    return RequestSettings.from_extra_args(None if params is None else params.extra_args)


def engine_capacity(vllm_config: VllmConfig) -> Capacity | None:
    """What one engine behind this API process holds, or None before the engine has said so.

    The number of blocks that vLLM reports is the sum over the engines of this process. Of a
    model with several KV-cache groups it is more than one group can have, which the scheduler
    knows.
    """
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        return None
    parallel = vllm_config.parallel_config
    num_engines = parallel.data_parallel_size
    if parallel.local_engines_only:
        num_engines = parallel.data_parallel_size_local
    if parallel.data_parallel_rank_local is not None:
        num_engines = 1
    return Capacity(
        num_blocks=num_blocks // num_engines - 1,
        block_size=vllm_config.cache_config.block_size,
        max_model_len=vllm_config.model_config.max_model_len,
        max_in_flight_tokens=vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens,
        num_lookahead_tokens=vllm_config.num_lookahead_tokens,
    )


def refuse_request(
    vllm_config: VllmConfig, params: object, num_prompt_tokens: int | None, resumable: bool = False
) -> None:
    """Raise vLLM's error for a bad request where ``params`` ask for what cannot be served.

    num_prompt_tokens: None where the prompt is not tokenized yet; then only the values are
    looked at. resumable: the prompt goes on growing.
    """
    if not isinstance(params, SamplingParams) or not params.extra_args:
        return
    settings = settings_of(vllm_config)
    if settings is None:
        return
    try:
        asked = asked_by(params)
        capacity = engine_capacity(vllm_config)
        if capacity is not None:
            capacity.check_budget(asked, settings)
        if capacity is not None and num_prompt_tokens is not None:
            unbounded = resumable or params.max_tokens is None
            max_tokens = capacity.max_model_len if unbounded else params.max_tokens
            capacity.check_length(asked, settings, num_prompt_tokens, max_tokens)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=error.key) from error


def keep_servable(request: Request, settings: Settings, capacity: Capacity) -> None:
    """Take values that cannot be served off a request that arrived at the scheduler.

    It is served as the server is set up, and a warning says why; the API process refuses such
    requests, but does not know how several KV-cache groups share the pool.
    """
    params = request.sampling_params
    if params is None or not params.extra_args:
        return
    try:
        asked = asked_by(params)
        capacity.check_budget(asked, settings)
        max_tokens = capacity.max_model_len if request.resumable else request.max_tokens
        capacity.check_length(asked, settings, request.num_prompt_tokens, max_tokens)
    except RequestError as error:
        params.extra_args = without_own_keys(params.extra_args)
        logger.warning(
            "Request %s is compressed as the server is set up, not as it asks for: %s",
            request.request_id,
            error,
        )


@cache
def install() -> None:
    """Wrap the two methods, once per process; raises SeamError where they have changed."""
    require_attributes(InputProcessor, {"process_inputs": FunctionType})
    require_attributes(AsyncLLM, {"generate": FunctionType})
    _wrap_process_inputs()
    _wrap_generate()


def _wrap_process_inputs() -> None:
    original = InputProcessor.process_inputs

    @wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        """The finished request is looked at: its prompt has a length, its answer a limit."""
        request = original(self, *args, **kwargs)
        num_prompt_tokens = length_from_prompt_token_ids_or_embeds(
            request.prompt_token_ids, request.prompt_embeds
        )
        refuse_request(
            self.vllm_config, request.sampling_params, num_prompt_tokens, request.resumable
        )
        return request

    InputProcessor.process_inputs = process_inputs


def _wrap_generate() -> None:
    original = AsyncLLM.generate

    @wraps(original)
    def generate(
        self: AsyncLLM, prompt: object, sampling_params: object, *args: Any, **kwargs: Any
    ) -> Any:
        """Not a generator itself: a refusal is raised at the call, before a response begins."""
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        num_prompt_tokens = None if tokens is None else len(tokens)
        refuse_request(self.vllm_config, sampling_params, num_prompt_tokens)
        return original(self, prompt, sampling_params, *args, **kwargs)

    AsyncLLM.generate = generate
