"""One engine after the other on one cache folder, with something changed or broken in between.

``test_restarts.py`` judges what each start said and what it left behind.
"""

import gc
import logging
import os
from pathlib import Path
from typing import Any

from engine_runs import SMALL
from full_disk import full_disk
from observed_engine import Observer, start_engine
from safetensors.torch import load_file, save_file
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from triattention_vllm.errors import TriAttentionError
from triattention_vllm.log import logger


class Starts:
    """Starts engines of one model and remembers how each of them went."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.seen: dict[str, dict[str, Any]] = {}

    def start(
        self, name: str, num_tokens: int = 0, reload: tuple[Path, ...] = (), **settings: Any
    ) -> None:
        """One start; ``num_tokens`` are generated, so that rounds run, or the weights of these
        folders are loaded in place, one after the other."""
        seen: dict[str, Any] = {"error": "", "source": ""}
        llm = None
        try:
            llm = start_engine(
                str(self.model),
                {**SMALL, **settings},
                kv_cache_memory_bytes=8 << 20,
                max_model_len=1024,
                max_num_batched_tokens=512,
                disable_log_stats=True,
            )
            seen["source"] = llm.collective_rpc(_source)[0]
            if num_tokens:
                seen |= _generated(llm, num_tokens)
            seen["reloads"] = [_warnings_of_reload(llm, folder) for folder in reload]
        except TriAttentionError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        files = sorted(self.cache.iterdir()) if self.cache.exists() else []
        seen["files"] = {path.name: path.read_bytes() for path in files}
        self.seen[name] = seen

    def set_nan(self, weight: str) -> None:
        """One value of one weight is NaN from now on."""
        tensors = load_file(self.model / "model.safetensors")
        tensors[weight][0, 0] = float("nan")
        save_file(tensors, self.model / "model.safetensors", {"format": "pt"})


def _source(wrapper: Any) -> str:
    source = wrapper.worker.statistics_source
    return "none" if source is None else str(source.description)


def _warnings_of_reload(llm: Any, folder: Path) -> list[str]:
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    logger.removeHandler(handler)
    return records


def _generated(llm: Any, num_tokens: int) -> dict[str, Any]:
    observer = Observer(llm)
    params = SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=1, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": list(range(40))}], params, use_tqdm=False)
    return {
        "num_tokens": len(output.outputs[0].token_ids),
        "num_rounds": observer.take()[0].num_rounds,
        "num_held": observer.num_held,
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The starts, in the order in which they build on each other."""
    os.environ["TRIATTENTION_CACHE"] = job["cache"]
    model, cache = Path(job["model"]), Path(job["cache"])
    own, other = {"calibration_text": job["text"]}, {"calibration_text": job["other_text"]}
    starts = Starts(model, cache)
    with full_disk(3000):
        starts.start("full disk", **own)
    starts.start("first", **own)
    starts.start("again", reload=(model, Path(job["other_weights"]).parent), **own)
    starts.start("another text", **other)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    starts.start("truncated", **other)
    kept.write_bytes(whole[:-9] + bytes([whole[-9] ^ 64]) + whole[-8:])
    starts.start("flipped bit", **other)
    kept.write_bytes(whole)
    good = (model / "model.safetensors").read_bytes()
    # Statistics come from before; queries are right, the last layer's keys are not.
    starts.set_nan("model.layers.1.self_attn.k_proj.weight")
    starts.start("NaN keys", num_tokens=300, **other)
    (model / "model.safetensors").write_bytes(good)
    starts.set_nan("model.layers.0.self_attn.q_proj.weight")
    starts.start("NaN queries", **other)
    starts.start("NaN queries without statistics", method="knorm")
    starts.start("NaN queries while calibrating", **own)
    (model / "model.safetensors").write_bytes(Path(job["other_weights"]).read_bytes())
    starts.start("other weights", num_tokens=300, **other)
    starts.start("file of the former weights", statistics=str(kept))
    return starts.seen
