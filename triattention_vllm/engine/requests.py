"""Requests that cannot be compressed as they ask, or at all: answered before they are scheduled.

A value that cannot be served is answered to its client. vLLM has no seam for that which also
answers a streaming request with a status, so two methods of its API side are wrapped: one that
every request passes, and one that is called before a stream begins; and a third, which is awaited
before the first request, to ask the engine what it holds. A value that reaches the scheduler
nevertheless, past the API, is dropped there with a warning.
"""

from collections.abc import Mapping
from functools import cache, wraps
from types import FunctionType
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.request import Request

from triattention_vllm.config import OFF, Settings
from triattention_vllm.engine.settings import settings_of
from triattention_vllm.engine.versions import require_attributes
from triattention_vllm.errors import RequestError
from triattention_vllm.log import logger
from triattention_vllm.request import METHOD_KEY, Capacity, RequestSettings, without_own_keys


def asked_by(params: SamplingParams | None) -> RequestSettings:
    """What a request asks for. Raises RequestError."""
    return RequestSettings.from_extra_args(None if params is None else params.extra_args)


_CAPACITIES: dict[str, Capacity] = {}
"""Instance id of a configuration -> what an engine behind this API process holds. Its workers are
asked (``kv_capacity``) before the first request, because they know how groups share the pool."""


def refuse_request(
    vllm_config: VllmConfig,
    params: object,
    num_prompt_tokens: int | None,
    resumable: bool = False,
    has_media: bool = False,
) -> None:
    """Raise vLLM's error for a bad request where ``params`` ask for what cannot be served.

    num_prompt_tokens: None where the prompt is not tokenized yet; then only the values are
    looked at. resumable: the prompt goes on growing. has_media: there is more in it than text.
    """
    if not isinstance(params, SamplingParams) or not (params.extra_args or has_media):
        return
    settings = settings_of(vllm_config)
    if settings is None:
        return
    try:
        asked = asked_by(params)
        capacity = _CAPACITIES.get(vllm_config.instance_id)
        if capacity is not None:
            capacity.check_budget(asked, settings)
        if num_prompt_tokens is None:
            return
        max_tokens = None if resumable else params.max_tokens
        if capacity is not None:
            most = capacity.max_model_len if max_tokens is None else max_tokens
            capacity.check_length(asked, settings, num_prompt_tokens, most)
        if has_media and settings.needs_statistics:
            check_media(asked, settings, vllm_config.model_config, num_prompt_tokens, max_tokens)
    except RequestError as error:
        raise VLLMValidationError(str(error), parameter=error.key) from error


def check_media(
    asked: RequestSettings,
    settings: Settings,
    model: ModelConfig,
    num_prompt_tokens: int,
    max_tokens: int | None,
) -> None:
    """Raise RequestError where a request with images or video, on a model with M-RoPE, may come to
    a round: there an image has fewer positions than tokens, and the position of the next query is
    taken from the number of tokens. max_tokens: None where the model alone bounds the answer."""
    policy = asked.policy(settings.policy(block_size=1))
    if policy is None or not model.uses_mrope:
        return
    first_round = policy.request_budget(num_prompt_tokens) + policy.interval
    longest = model.max_model_len if max_tokens is None else num_prompt_tokens + max_tokens
    if longest >= first_round:
        raise RequestError(
            "images and video are not compressed on a model with M-RoPE, whose positions are not "
            f"its tokens'; allowed are prompts of text, requests of less than {first_round} tokens "
            f'with their max_tokens, and {METHOD_KEY} "{OFF}".',
            METHOD_KEY,
        )


def keep_servable(request: Request, settings: Settings, capacity: Capacity) -> None:
    """Take values that cannot be served off a request that arrived at the scheduler.

    It is served as the server is set up, and a warning says why; the API process refuses such
    requests before they come here.
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
    """Wrap the methods, once per process; raises SeamError where they have changed."""
    require_attributes(InputProcessor, {"process_inputs": FunctionType})
    require_attributes(AsyncLLM, {"generate": FunctionType, "get_supported_tasks": FunctionType})
    require_attributes(LLMEngine, {"get_supported_tasks": FunctionType})
    _wrap_process_inputs()
    _wrap_generate()
    _ask_for_capacity()


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
            self.vllm_config,
            request.sampling_params,
            num_prompt_tokens,
            request.resumable,
            has_media=bool(request.mm_features),
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
        known = prompt if isinstance(prompt, Mapping) else {}
        tokens = known.get("prompt_token_ids")
        num_prompt_tokens = None if tokens is None else len(tokens)
        has_media = num_prompt_tokens is not None and bool(known.get("mm_placeholders"))
        refuse_request(self.vllm_config, sampling_params, num_prompt_tokens, has_media=has_media)
        return original(self, prompt, sampling_params, *args, **kwargs)

    AsyncLLM.generate = generate


def _ask_for_capacity() -> None:
    of_server, of_offline = AsyncLLM.get_supported_tasks, LLMEngine.get_supported_tasks

    @wraps(of_server)
    async def ask_from_server(self: AsyncLLM) -> Any:
        if _is_unknown(self.vllm_config):
            _note_capacity(self.vllm_config, await self.collective_rpc("kv_capacity"))
        return await of_server(self)

    @wraps(of_offline)
    def ask_offline(self: LLMEngine) -> Any:
        if _is_unknown(self.vllm_config):
            _note_capacity(self.vllm_config, self.collective_rpc("kv_capacity"))
        return of_offline(self)

    AsyncLLM.get_supported_tasks = ask_from_server
    LLMEngine.get_supported_tasks = ask_offline


def _is_unknown(vllm_config: VllmConfig) -> bool:
    return settings_of(vllm_config) is not None and vllm_config.instance_id not in _CAPACITIES


def _note_capacity(vllm_config: VllmConfig, of_workers: list[dict[str, int]]) -> None:
    """All workers answer alike: every rank has the blocks and groups of all."""
    _CAPACITIES[vllm_config.instance_id] = Capacity(**of_workers[0])
