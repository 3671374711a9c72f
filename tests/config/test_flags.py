"""The flags, through vLLM's real parser of ``vllm serve``."""

import argparse
import json
from pathlib import Path

import pytest
from serve_parser import serve_parser
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from triattention_vllm.engine.cli import flags_of
from triattention_vllm.plugin import register


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return serve_parser()


def parse(parser: FlexibleArgumentParser, *flags: str) -> argparse.Namespace:
    return parser.parse_args(["serve", "some-model", *flags])


def test_without_flags_there_is_nothing(parser: FlexibleArgumentParser, model: str) -> None:
    args = parse(parser)
    args.model = model
    assert flags_of(args) == {}
    assert AsyncEngineArgs.from_cli_args(args).additional_config == {}


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-compression-config", '{"budget": 1024, "protect": "sinks"}'],
        ['--kv-compression-config={"budget": 1024, "protect": "sinks"}'],
        ["--kv-compression-config.budget", "1024", "--kv-compression-config.protect", "sinks"],
        ["--kv-compression-config.budget=1024", "--kv-compression-config.protect=sinks"],
        ["--kv-compression-config", '{"budget": 1024}', "--kv-compression-config.protect=sinks"],
        ["--kv_compression_config.budget=1024", "--kv_compression_config.protect=sinks"],
    ],
)
def test_json_and_dotted_flags_mean_the_same(
    parser: FlexibleArgumentParser, flags: list[str]
) -> None:
    args = parse(parser, "--kv-compression", "triattention", *flags)
    assert flags_of(args) == {"method": "triattention", "budget": 1024, "protect": "sinks"}


def test_a_dotted_path_keeps_its_dots(parser: FlexibleArgumentParser) -> None:
    args = parse(parser, "--kv-compression-config.statistics", "/models/qwen3.safetensors")
    assert flags_of(args) == {"statistics": "/models/qwen3.safetensors"}


def test_a_config_file_turns_compression_on_and_flags_overrule_its_keys(
    parser: FlexibleArgumentParser, tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "kv-compression: triattention\nkv-compression-config:\n  budget: 4096\n  window: 64\n"
    )
    args = parse(parser, "--config", str(path))
    assert flags_of(args) == {"method": "triattention", "budget": 4096, "window": 64}
    args = parse(parser, "--config", str(path), "--kv-compression-config.budget", "1024")
    assert flags_of(args) == {"method": "triattention", "budget": 1024, "window": 64}


@pytest.mark.parametrize("engine_args", [EngineArgs, AsyncEngineArgs])
def test_flags_overrule_additional_config_key_by_key(
    parser: FlexibleArgumentParser, model: str, engine_args: type[EngineArgs]
) -> None:
    given = {"other": 1, "kv_compression": {"method": "off", "budget": 4096, "window": 64}}
    args = parse(
        parser,
        "--additional-config",
        json.dumps(given),
        "--kv-compression",
        "triattention",
        "--kv-compression-config.budget",
        "1024",
    )
    args.model = model
    assert engine_args.from_cli_args(args).additional_config == {
        "other": 1,
        "kv_compression": {"method": "triattention", "budget": 1024, "window": 64},
    }
    assert args.additional_config == given


def test_arguments_built_twice_from_the_same_flags_are_equal(
    parser: FlexibleArgumentParser, model: str
) -> None:
    args = parse(parser, "--kv-compression", "triattention")
    args.model = model
    first, second = AsyncEngineArgs.from_cli_args(args), AsyncEngineArgs.from_cli_args(args)
    assert first.additional_config == second.additional_config
    assert first.additional_config is not second.additional_config
    assert EngineArgs(model=model).additional_config == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compression", "kivi"], "invalid choice: 'kivi'"),
        (["--kv-compression-config", "{budget: 1}"], "--kv-compression-config is not JSON"),
        (["--kv-compression-config", "[1]"], "allowed is a JSON object of settings"),
        (["--kv-compression-config", "2048"], "allowed is a JSON object of settings"),
    ],
)
def test_a_wrong_flag_ends_with_usage(
    parser: FlexibleArgumentParser,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(parser, *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_registering_again_adds_nothing(parser: FlexibleArgumentParser) -> None:
    wrapped = EngineArgs.create_engine_config
    register()
    register()
    assert EngineArgs.create_engine_config is wrapped
    assert AsyncEngineArgs.create_engine_config is wrapped
    again = FlexibleArgumentParser(prog="again")
    AsyncEngineArgs.add_cli_args(again)
    assert [a.dest for a in again._actions].count("kv_compression") == 1


def test_the_help_of_serve_has_a_group_for_compression(parser: FlexibleArgumentParser) -> None:
    serve = FlexibleArgumentParser(prog="serve")
    AsyncEngineArgs.add_cli_args(serve)
    group = next(g for g in serve._action_groups if g.title == "KV compression")
    assert [action.option_strings[0] for action in group._group_actions] == [
        "--kv-compression",
        "--kv-compression-config",
    ]
    assert "- budget (a whole number of tokens" in (group._group_actions[1].help or "")
