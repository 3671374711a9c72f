"""Where a running model's statistics come from: a file, the cache folder, or a calibration now."""

import hashlib
import logging
from collections.abc import Sequence

from vllm.v1.kv_cache_interface import KVCacheConfig

from triattention_vllm.config import Settings
from triattention_vllm.engine import cache_folder
from triattention_vllm.engine.calibration import calibrate
from triattention_vllm.engine.calibration_run import EngineWorker
from triattention_vllm.engine.fingerprint import model_fingerprint, weights_hash
from triattention_vllm.engine.ranks import is_first_rank, on_first_rank
from triattention_vllm.engine.rotary import read_rotary
from triattention_vllm.errors import StatisticsError
from triattention_vllm.log import log_once, logger
from triattention_vllm.method.rope import Rotary
from triattention_vllm.method.statistics import Fingerprint, Statistics, import_published
from triattention_vllm.texts import shipped_text

REPLACED = (
    "KV compression: the weights have been replaced, and requests are still scored with the "
    "statistics of those before. Start the server again where the model has become another one. "
    "This is logged once."
)


class StatisticsSource:
    """Statistics of one worker's model, found when the model is loaded or made after warm-up.

    All ranks construct it and call ``ready``; only global rank 0 touches files, and an error
    there is raised on every rank.

    rotary: parameters of this rank's ``layer_names``, same order. fingerprint: the whole model's.
    description: where the statistics come from, in a few words.
    """

    def __init__(
        self, worker: EngineWorker, layer_names: Sequence[str], settings: Settings
    ) -> None:
        """Read the model's rotary parameters and look for its statistics.

        Raises UnsupportedError or SeamError for a rotary embedding that cannot be read,
        StatisticsError for a file that is wrong or a cache folder that cannot be written.
        """
        self._worker = worker
        self._layer_names = list(layer_names)
        self._settings = settings
        model = worker.get_model()
        self.rotary = read_rotary(model, self._layer_names)
        self.fingerprint = model_fingerprint(
            worker.vllm_config, model, self._layer_names, self.rotary
        )
        found = on_first_rank(lambda: find_statistics(settings, self.fingerprint))
        self._statistics: Statistics | None = None
        self.description = "not made yet"
        if found is not None:
            self._statistics, self.description = found

    @property
    def has_to_be_made(self) -> bool:
        """Whether ``ready`` will make the statistics; the same on every rank."""
        return self._statistics is None

    def warn_if_replaced(self) -> None:
        """Say so on global rank 0 where the model has other weights than it was loaded with."""
        if is_first_rank():
            now = weights_hash(self._worker.vllm_config, self._worker.get_model())
            if now != self.fingerprint.weights_hash:
                log_once(logging.WARNING, REPLACED)

    def rotary_of(self, layer_names: Sequence[str]) -> Rotary:
        """The rotary parameters of some of this rank's layers."""
        return self.rotary.select_layers([self._layer_names.index(name) for name in layer_names])

    def ready(self, kv_cache_config: KVCacheConfig) -> Statistics:
        """The statistics; made now, and kept in the cache folder, if they were not found.

        Called after warm-up, when the KV cache is allocated and no request is scheduled.
        """
        if self._statistics is None:
            text, name = on_first_rank(lambda: calibration_text(self._settings))
            if is_first_rank():
                logger.info("Making statistics of this model from %s, once.", name)
            made = calibrate(
                self._worker,
                kv_cache_config,
                self._layer_names,
                self.rotary,
                self.fingerprint,
                text,
                name,
            )
            path = on_first_rank(lambda: str(cache_folder.keep(made)))
            self.description = f"made from {name}, kept in {path}"
            self._statistics = made
        return self._statistics


def find_statistics(settings: Settings, fingerprint: Fingerprint) -> tuple[Statistics, str] | None:
    """Statistics from the file that the settings name (``.pt``: a published one), else from the
    cache folder, with a description; None where they have to be made.

    Raises StatisticsError for a file that is wrong, or where none can be kept.
    """
    path = settings.statistics_path
    if path is not None and path.suffix == ".pt":
        return import_published(path, fingerprint), str(path)
    if path is not None:
        statistics = Statistics.load(path)
        statistics.check_fits(fingerprint)
        return statistics, str(path)
    _, name = calibration_text(settings)
    kept = cache_folder.load_or_none(fingerprint)
    if kept is None or kept.provenance.get("text") != name:
        cache_folder.check_writable()
        return None
    return kept, str(cache_folder.cached_file(fingerprint))


def calibration_text(settings: Settings) -> tuple[str, str]:
    """The user's text or the shipped one, and how statistics name it: with a hash, so that
    statistics of another text are told apart.

    Raises StatisticsError for a file that is not readable text.
    """
    path = settings.calibration_text_path
    if path is None:
        return _named(shipped_text(), "the shipped text")
    try:
        return _named(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise StatisticsError(
            f"the calibration text {path} cannot be read ({error}); give a UTF-8 text file, or "
            "leave calibration_text out to use the one that is shipped"
        ) from error


def _named(text: str, name: str) -> tuple[str, str]:
    return text, f"{name} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"
