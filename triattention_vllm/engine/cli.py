"""The flags, and the three methods of vLLM's EngineArgs that carry them to the engine.

vLLM has no seam for flags. The wrappers here add nothing to a run without settings: the
parser gains one group, and the configuration that vLLM built is returned as it is.
"""

import argparse
import json
import os
from collections.abc import Sequence
from functools import cache, wraps
from types import FunctionType
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from triattention_vllm.config import OFF, Settings, descriptions
from triattention_vllm.engine.metrics_folder import share_metrics_folder
from triattention_vllm.engine.other_plugins import refuse_authors_plugin
from triattention_vllm.engine.settings import additional_settings, with_settings
from triattention_vllm.engine.versions import require_attributes, require_verified, vllm_version
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.settings_text import settings_help
from triattention_vllm.sources import merge, resolve_settings

SCHEDULER = "triattention_vllm.engine.scheduler.CompressionScheduler"
ASYNC_SCHEDULER = "triattention_vllm.engine.scheduler.CompressionAsyncScheduler"
METHOD_FLAG = "--kv-compression"
SETTINGS_FLAG = "--kv-compression-config"


@cache
def install() -> None:
    """Wrap ``EngineArgs``, once per process; raises SeamError where it has changed."""
    require_attributes(
        EngineArgs,
        {
            "add_cli_args": staticmethod,
            "from_cli_args": classmethod,
            "create_engine_config": FunctionType,
        },
    )
    _wrap_add_cli_args()
    _wrap_from_cli_args()
    _wrap_create_engine_config()


class MergeSettings(argparse.Action):
    """Merges a JSON object into what earlier flags gave, key by key, so that a config file,
    a JSON flag and dotted flags may be mixed; vLLM turns the dotted ones into one JSON flag."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Ends the command line's reading where ``values`` is no JSON object."""
        try:
            given = json.loads(str(values))
        except json.JSONDecodeError as error:
            parser.error(f"{SETTINGS_FLAG} is not JSON ({error}): {values!r}")
        if not isinstance(given, dict):
            parser.error(f"{SETTINGS_FLAG} is {values!r}, allowed is a JSON object of settings.")
        setattr(namespace, self.dest, merge(given, vars(namespace)[self.dest]))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the argument group of KV compression to a parser of engine arguments."""
    group = parser.add_argument_group(
        "KV compression", "Long answers in a bounded number of KV blocks."
    )
    group.add_argument(
        METHOD_FLAG,
        choices=(*descriptions()["method"].choices, OFF),
        default=None,
        help="Turns KV compression on or off; overrules additional_config and the environment. "
        'In a YAML file "off" needs its quotes.',
    )
    group.add_argument(
        SETTINGS_FLAG, action=MergeSettings, default=None, metavar="JSON", help=settings_help()
    )


def flags_of(args: argparse.Namespace) -> dict[str, object]:
    """The settings on the command line; empty where the parser was built without our flags."""
    given = vars(args)
    method = given.get("kv_compression")
    return merge({} if method is None else {"method": method}, given.get("kv_compression_config"))


def turn_on(vllm_config: VllmConfig, settings: Settings) -> None:
    """Write ``settings`` into a finished configuration and choose scheduler and worker.

    Raises UnsupportedError for what cannot run together with KV compression, SettingsError
    where the settings contradict the engine.
    """
    require_verified(vllm_version(), os.environ)
    refuse_authors_plugin(os.environ)
    # Only now: these import parts of vLLM that an untested version may not have.
    from triattention_vllm.engine import requests
    from triattention_vllm.engine.refusals import refuse_unsupported
    from triattention_vllm.engine.worker_choice import compression_worker_class

    scheduler_config, parallel_config = vllm_config.scheduler_config, vllm_config.parallel_config
    max_model_len = vllm_config.model_config.max_model_len
    refuse_unsupported(vllm_config, settings)
    settings.check_engine(max_model_len, vllm_config.cache_config.block_size)
    settings.check_files()
    if scheduler_config.scheduler_cls is not None:
        raise UnsupportedError(
            f"The scheduler class is {scheduler_config.scheduler_cls}, but KV compression "
            "brings its own; leave out --scheduler-cls, or turn compression off."
        )
    parallel_config.worker_cls = compression_worker_class(parallel_config.worker_cls, os.environ)
    is_async = scheduler_config.async_scheduling
    scheduler_config.scheduler_cls = ASYNC_SCHEDULER if is_async else SCHEDULER
    vllm_config.additional_config = with_settings(
        vllm_config.additional_config, settings.to_mapping()
    )
    requests.install()


def _wrap_add_cli_args() -> None:
    original = EngineArgs.add_cli_args

    @wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        add_flags(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def _wrap_from_cli_args() -> None:
    original = vars(EngineArgs)["from_cli_args"].__func__

    @wraps(original)
    def from_cli_args(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        """Flags and ``additional_config`` are merged here, flags first, and the result travels
        in the arguments' own field, which survives every copy that vLLM makes of them."""
        engine_args = original(cls, args)
        flags = flags_of(args)
        if flags:
            additional = engine_args.additional_config
            merged = merge(flags, additional_settings(additional))
            engine_args.additional_config = with_settings(additional, merged)
        return engine_args

    EngineArgs.from_cli_args = classmethod(from_cli_args)


def _wrap_create_engine_config() -> None:
    original = EngineArgs.create_engine_config

    @wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        """Settings are resolved first, so that a wrong one is named before a model is read."""
        settings = resolve_settings(additional_settings(self.additional_config), os.environ)
        vllm_config = original(self, *args, **kwargs)
        if settings is not None:
            turn_on(vllm_config, settings)
            share_metrics_folder(log_stats=not self.disable_log_stats)
        return vllm_config

    EngineArgs.create_engine_config = create_engine_config
