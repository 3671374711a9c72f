"""Statistics of a model without serving it: an offline engine that starts, calibrates and ends."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from triattention_vllm.config import ADDITIONAL_CONFIG_KEY, Settings
from triattention_vllm.environment import CACHE
from triattention_vllm.errors import SeamError, StatisticsError, TriAttentionError
from triattention_vllm.method.statistics import Statistics

_QUIET = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def calibrate_model(
    model: str, calibration_text: str | None, engine_arguments: Mapping[str, object]
) -> Statistics:
    """Start vLLM with KV compression and an empty cache folder: what it leaves there.

    calibration_text: a text file, or None for the shipped text. engine_arguments: further
    arguments of ``vllm.LLM``. Environment variables that quieten vLLM are set where unset.
    """
    with tempfile.TemporaryDirectory(prefix="triattention-") as folder:
        with _variable(CACHE, folder):
            _start(model, _settings(calibration_text=calibration_text), engine_arguments)
        files = sorted(Path(folder).glob("*.safetensors"))
        if len(files) != 1:
            raise SeamError(
                f"the engine left {len(files)} statistics files where one was expected: is the "
                "plugin `triattention_vllm` among vllm.general_plugins of this environment, and "
                "VLLM_PLUGINS unset or naming it?"
            )
        return Statistics.load(files[0])


def check_statistics(model: str, statistics: str, engine_arguments: Mapping[str, object]) -> None:
    """Start vLLM with a statistics file; raises StatisticsError where it does not fit."""
    _start(model, _settings(statistics=statistics), engine_arguments)


def _settings(calibration_text: str | None = None, statistics: str | None = None) -> Settings:
    """A small budget, so that short models start too; calibration never compresses."""
    return Settings(
        budget=1024, protect="sinks", calibration_text=calibration_text, statistics=statistics
    )


def _start(model: str, settings: Settings, engine_arguments: Mapping[str, object]) -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Imported here, because vLLM sets up its logging from these variables when it is imported.
    from vllm import LLM

    if "additional_config" in engine_arguments:
        raise StatisticsError(
            "additional_config is set by this command and cannot be among the engine arguments; "
            "leave it out"
        )
    arguments = {"enforce_eager": True, **engine_arguments}
    config = {ADDITIONAL_CONFIG_KEY: settings.to_mapping()}
    try:
        engine = LLM(model=model, additional_config=config, **arguments)
    except TriAttentionError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise StatisticsError(
            f"vLLM cannot start {model} ({reason}); give a model and engine arguments with which "
            "`vllm serve` starts"
        ) from error
    engine.llm_engine.engine_core.shutdown()


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, for the processes of one engine."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
