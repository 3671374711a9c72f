"""Import what an engine process on a GPU imports of ours, in steps; print what came along.

Platforms choose nothing while modules are imported, so this needs no GPU.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

import triattention_vllm
from triattention_vllm.plugin import register

PLUGIN = Path(triattention_vllm.__file__).parent
PLACEHOLDERS = "vllm.v1.worker.cpu.shm"


def modules_for_a_gpu() -> list[str]:
    """Everything of ours but the CPU's worker, the GPU benchmarks' sides too."""
    paths = [path.relative_to(PLUGIN.parent).with_suffix("") for path in PLUGIN.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    names.remove("triattention_vllm.engine.worker_cpu")
    return [*sorted(names), "gpu.side", "gpu.dense"]


def main() -> None:
    """Every step in one process: the later ones find what the earlier ones imported."""
    found: dict[str, bool] = {}
    register()
    from vllm.engine.arg_utils import EngineArgs

    on = {"kv_compression": {"method": "triattention"}}
    EngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, additional_config=on
    ).create_engine_config()
    found["placeholders with the configuration"] = PLACEHOLDERS in sys.modules
    import_module("triattention_vllm.engine.worker")
    found["flashinfer with the worker"] = "flashinfer" in sys.modules
    import fake_flashinfer

    with fake_flashinfer.installed():
        for name in modules_for_a_gpu():
            import_module(name)
    own = torch.cuda.Event.__module__.startswith("torch.")
    found["placeholders with everything for a GPU"] = PLACEHOLDERS in sys.modules or not own
    import_module("triattention_vllm.engine.worker_cpu")
    found["placeholders with the worker of the CPU"] = PLACEHOLDERS in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
