"""A soak: mixed traffic and faults on a compressing server, whose engine checks every step.

    python benchmarks/soak.py [--minutes 60] [--seed 0] [--stock] [--output FILE]

A tiny random model is served with a pool that is too small for the traffic, so that requests are
preempted. Inside the engine ``soak_checks.py`` holds rows, references, bounds and the bytes of
hashed blocks after each step; a broken law ends the server. Writes one JSON file: what was sent
and lost, steps and rounds, and the trend of memory, descriptors and threads of every process.
Ends with status 1 where anything was lost. ``--stock`` serves without compression and its checks,
to tell what vLLM's own processes do under the same traffic.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from engine import HERE, Json, conditions
from prometheus_client.parser import text_string_to_metric_families
from reporting import write_json
from soak_memory import FOLDER
from soak_processes import ProcessSampler
from soak_traffic import Traffic, learn_references
from tiny_model import write_tiny_model

from triattention_vllm.tools.server import Server, serving

CLIENTS = (16, 24, 32, 48, 64)
# oneDNN keeps every primitive that it compiled for a batch of a new size, up to 1024 of them, with
# compression and without it: growth that is not the server's would hide what is.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_SECONDS_TO_START = 1200.0
_SECONDS_TO_FINISH = 900.0
"""Of one request, and of those that are under way when the time is over."""


@dataclass(frozen=True)
class Size:
    """What is served. The pool has 192 blocks of 32 tokens; 64 requests at budget + interval
    would need 640. Without compression a request has to fit into it whole."""

    minutes: float
    seed: int
    stock: bool
    pool_bytes: int = 6 << 20
    block_size: int = 32
    budget: int = 256
    interval: int = 64
    window: int = 32
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64

    @property
    def phase(self) -> float:
        """Seconds until the number of clients changes; a reset of the prefix cache ends it."""
        return min(60.0, self.minutes * 60 / 5)

    @property
    def max_model_len(self) -> int:
        """More than the pool holds, with compression."""
        return 6000 if self.stock else 8192

    @property
    def plugins(self) -> list[str]:
        """General plugins of vLLM, which every process of the server loads. On a CPU vLLM switches
        asynchronous scheduling off."""
        common = ["cpu_engine:keep_async_scheduling", "soak_memory:install"]
        return common if self.stock else [*common, "soak_checks:install"]

    @property
    def arguments(self) -> list[str]:
        """Of ``vllm serve``."""
        compression = [
            "--kv-compression=triattention",
            f"--kv-compression-config.budget={self.budget}",
            f"--kv-compression-config.interval={self.interval}",
            f"--kv-compression-config.window={self.window}",
        ]
        return [
            "--served-model-name=tiny",
            "--dtype=float32",
            "--enforce-eager",
            f"--block-size={self.block_size}",
            f"--kv-cache-memory-bytes={self.pool_bytes}",
            f"--max-model-len={self.max_model_len}",
            f"--max-num-batched-tokens={self.max_num_batched_tokens}",
            f"--max-num-seqs={self.max_num_seqs}",
            "--scheduling-policy=priority",
            "--enable-prefix-caching",
            "--shutdown-timeout=20",
            "--disable-uvicorn-access-log",
            # Asynchronous scheduling keeps two steps in flight with workers of their own only.
            "--distributed-executor-backend=mp",
            *([] if self.stock else compression),
        ]


async def send(server: Server, size: Size, traffic: Traffic, sampler: ProcessSampler) -> Json:
    """Traffic until the time is over, then whatever was under way is waited for."""
    await learn_references(traffic)
    sampling = asyncio.create_task(sampler.run(min(5.0, size.phase / 4)))
    end = time.monotonic() + size.minutes * 60
    num_clients, num_resets = 0, 0

    async def client(idx: int) -> None:
        while time.monotonic() < end:
            if idx < num_clients:
                await traffic.one()
            else:
                await asyncio.sleep(0.2)

    clients = [asyncio.create_task(client(idx)) for idx in range(max(CLIENTS))]
    try:
        while time.monotonic() < end and server.process.poll() is None:
            num_clients = traffic.rng.choice(CLIENTS)
            await asyncio.sleep(min(size.phase, max(0.0, end - time.monotonic())))
            # All running requests lose their blocks and begin again.
            url = f"{server.root_url}/reset_prefix_cache?reset_running_requests=true"
            async with traffic.session.post(url) as response:
                num_resets += response.status == 200
        await asyncio.wait_for(asyncio.gather(*clients), _SECONDS_TO_FINISH)
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
    return {"resets_of_the_prefix_cache": num_resets}


async def soak(server: Server, size: Size, folder: Path) -> Json:
    """The whole report of one server, without conditions."""
    sampler = ProcessSampler(server.process.pid, folder)
    timeout = aiohttp.ClientTimeout(total=_SECONDS_TO_FINISH)
    # The server closes a connection that was idle for 5 s, which may be when it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        traffic = Traffic(session, server.root_url, size.seed, size.stock)
        start = time.monotonic()
        faults = await send(server, size, traffic, sampler)
        seconds = time.monotonic() - start
    return {
        "seconds": seconds,
        "requests": {
            name: {
                **tally.results,
                "prompt_tokens": tally.prompt_tokens,
                "completion_tokens": tally.completion_tokens,
            }
            for name, tally in sorted(traffic.tallies.items())
        },
        "totals": {
            **{
                result: sum(tally.results[result] for tally in traffic.tallies.values())
                for result in ("served", "refused", "aborted", "lost")
            },
            "prompt_tokens": sum(t.prompt_tokens for t in traffic.tallies.values()),
            "completion_tokens": sum(t.completion_tokens for t in traffic.tallies.values()),
        },
        "faults": faults,
        "losses": traffic.losses[:50],
        "metrics": own_metrics(server.metrics()),
        # The first quarter is warm-up.
        "processes": sampler.report(warm_up=seconds / 4),
    }


def own_metrics(text: str) -> Json:
    """Counters of KV compression, and vLLM's own of preemptions and the prefix cache."""
    wanted = ("vllm:num_preemptions", "vllm:prefix_cache_hits", "vllm:prefix_cache_queries")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.endswith(("_total", "cached_tokens", "logical_tokens"))
        and (family.name.startswith("triattention:") or family.name in wanted)
    }


def wait_until_idle(folder: Path) -> Json:
    """What the scheduler's checks say once no request is left. Raises TimeoutError."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found: Json = json.loads((folder / "scheduler.json").read_text())
        if found["is_idle"]:
            return found
        time.sleep(0.2)
    raise TimeoutError(f"the scheduler still has requests: {found}")


def write_plugins(folder: Path, plugins: list[str]) -> None:
    """Metadata of a distribution that has these plugins, where ``folder`` is on the path."""
    metadata = folder / "soak-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: soak\nVersion: 0\n")
    entries = [f"{plugin.replace(':', '_')} = {plugin}\n" for plugin in plugins]
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\n" + "".join(entries))


def run(size: Size, output: Path) -> bool:
    """Serve, send, write ``output``; returns whether nothing was lost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_model(folder / "model", num_layers=2, hidden_size=128, head_dim=32)
        write_plugins(folder, size.plugins)
        environment = {
            **ENVIRONMENT,
            "TRIATTENTION_CACHE": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(
                [str(folder), str(HERE), os.environ.get("PYTHONPATH", "")]
            ),
            FOLDER: str(folder),
        }
        log = output.with_suffix(".log")
        output.parent.mkdir(parents=True, exist_ok=True)
        with serving(
            model, size.arguments, log, environment=environment, timeout=_SECONDS_TO_START
        ) as server:
            described = {"arguments": size.arguments, "environment": ENVIRONMENT}
            report: Json = {"conditions": conditions(size, described)}
            report |= asyncio.run(soak(server, size, folder))
            if not size.stock:
                report["checks"] = {
                    "scheduler": wait_until_idle(folder),
                    "worker": json.loads((folder / "worker.json").read_text()),
                }
        report["exit_code"] = server.stop()
    write_json(output, report)
    told = {name: report[name] for name in ("totals", "checks", "metrics") if name in report}
    print(json.dumps(told, indent=1))
    print(f"wrote {output}")
    clean = not report["totals"]["lost"] and report["exit_code"] == 0
    if clean:
        log.unlink()
    return clean


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stock", action="store_true", help="vLLM without compression")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/soak[_stock]_cpu.json"
    )
    args = parser.parse_args()
    output = args.output or HERE / "results" / f"soak{'_stock' if args.stock else ''}_cpu.json"
    sys.exit(0 if run(Size(args.minutes, args.seed, args.stock), output) else 1)


if __name__ == "__main__":
    main()
