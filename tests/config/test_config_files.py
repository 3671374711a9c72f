"""The files in configs/ are what they say: vLLM's own parser reads them through our flags.

``tiny-cpu.yaml`` is served by the tests of tests/served.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from serve_parser import serve_parser

from triattention_vllm.config import Settings
from triattention_vllm.engine.cli import flags_of
from triattention_vllm.engine.worker_choice import GPU_WORKER, compression_worker_class
from triattention_vllm.environment import ALLOW_UNTESTED_VLLM
from triattention_vllm.errors import UnsupportedError
from triattention_vllm.tools.main import main

ROOT = Path(__file__).parents[2]
NAMES = ("agent-sessions", "batch-throughput", "reasoning-24gb", "tiny-cpu")
FILES = [ROOT / "configs" / f"{name}.yaml" for name in NAMES]
SHAPES = ROOT / "tests" / "tools" / "configs"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_vllm_parses_the_file_and_the_settings_are_valid(file: Path) -> None:
    written = yaml.safe_load(file.read_text())
    model = [] if "model" in written else ["some-folder"]
    args = serve_parser().parse_args(["serve", *model, "--config", str(file)])
    settings = Settings.from_mapping(flags_of(args))
    assert settings.method == written["kv-compression"]
    for name, value in written["kv-compression-config"].items():
        assert vars(settings)[name] == value
    settings.check_engine(args.max_model_len, args.block_size or 16)
    assert args.max_model_len == written["max-model-len"]
    if "model" in written:
        assert args.model == written["model"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_says_how_it_is_used(file: Path) -> None:
    """On a GPU with the variable without which compression does not start there."""
    text = file.read_text()
    assert f"--config configs/{file.name}" in text
    if file.stem != "tiny-cpu":
        with pytest.raises(UnsupportedError, match=ALLOW_UNTESTED_VLLM):
            compression_worker_class(GPU_WORKER, {})
        assert f"{ALLOW_UNTESTED_VLLM}=1 vllm serve --config configs/{file.name}" in text


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "wall", "length", "blocks"),
    [
        ("reasoning-24gb", "qwen3-32b", ["--gpu-memory", "24", "--weights-dtype", "awq"],
         "12,600", 40960, "201 blocks"),
        ("agent-sessions", "llama-3.1-8b", ["--gpu-memory", "24"], "50,000", 131072, "529 blocks"),
        ("batch-throughput", "qwen3-30b-a3b", ["--gpu-memory", "80"], "1,024", 16384, "73 blocks"),
    ],
)  # fmt: skip
def test_the_sizes_in_the_comments_are_those_of_the_plan(
    name: str,
    shape: str,
    arguments: list[str],
    wall: str,
    length: int,
    blocks: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And as many requests as the file allows fit."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    written = yaml.safe_load(text)
    settings = written["kv-compression-config"]
    arguments = [*arguments, "--budget", str(settings["budget"]), "--length", str(length)]
    arguments += ["--interval", str(settings["interval"])]
    arguments += ["--max-num-batched-tokens", str(written["max-num-batched-tokens"])]
    assert main(["plan", str(SHAPES / f"{shape}.json"), *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (fit,) = plan["fits"]
    assert plan["longest_compressed"] > 0
    assert fit["compressed_requests"] >= written["max-num-seqs"]
    assert blocks in text
    assert blocks.split()[0] == str(fit["compressed_blocks"])
    assert wall in text
    stated = int(re.sub(",", "", wall))
    found = fit["full_blocks"] if stated < 10000 else plan["wall_tokens"]
    assert found == pytest.approx(stated, rel=0.02)
