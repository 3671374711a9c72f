"""Commands that the documents show are understood, and what they print is what is shown."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_parser import serve_parser

from triattention_vllm.config import Settings
from triattention_vllm.engine.cli import flags_of
from triattention_vllm.environment import authors_table
from triattention_vllm.tools.main import SUBCOMMANDS, build_parser, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```bash\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
EXTRAS = re.compile(r"\.\[([\w,]+)\]")


def commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every command in a bash block; assignments before it left out."""
    for document in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        for _, block in BLOCK.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    command = words[:end]
                    words = words[end + 1 :]
                    while re.fullmatch(r"[A-Z_]+=.*", command[0]):
                        command = command[1:]
                    yield document.name, command


COMMANDS = list(commands())


def those_of(name: str) -> list[tuple[str, list[str]]]:
    return [(document, words[1:]) for document, words in COMMANDS if words[0] == name]


def test_every_command_of_a_bash_block_is_of_a_kind_that_is_tested_here() -> None:
    assert {words[0] for _, words in COMMANDS} <= {"vllm", "triattention", "make", "pip"}
    assert len(those_of("triattention")) > 5


@pytest.mark.parametrize(("document", "words"), those_of("triattention"))
def test_our_commands_are_parsed(document: str, words: list[str]) -> None:
    assert build_parser(words[0]).parse_args(words).subcommand == words[0], document


@pytest.mark.parametrize(("document", "words"), those_of("vllm"))
def test_flags_of_vllm_serve_are_parsed(document: str, words: list[str]) -> None:
    args = serve_parser().parse_args(words)
    Settings.from_mapping(flags_of(args))
    assert args.model_tag == "MODEL", document


@pytest.mark.parametrize(("document", "words"), those_of("make"))
def test_make_targets_exist(document: str, words: list[str]) -> None:
    assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), document


@pytest.mark.parametrize(("document", "words"), those_of("pip"))
def test_extras_exist(document: str, words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extras in EXTRAS.findall(" ".join(words)):
        for extra in extras.split(","):
            assert f"\n{extra} = [" in project, document


def test_the_plan_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    words = next(
        words for document, words in COMMANDS if words[1:2] == ["plan"] and "4bit" in words
    )
    config = ROOT / words[2]
    assert main(["plan", str(config), *words[3:]]) == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"```text\n{shown}\n```" in OPERATIONS


def test_the_readmes_known_case_is_the_plans() -> None:
    """The configuration is held against the command by the tests of configs/, and the page on
    operations by the test above; the README against both."""
    config = (ROOT / "configs" / "reasoning-24gb.yaml").read_text(encoding="utf-8")
    assert "ends near 12,600 tokens" in config
    assert "\nmax-model-len: 40960\n" in config
    assert "\nmax-num-seqs: 3\n" in config
    assert "  budget: 3072\n" in config
    assert "hits the wall at 23824 tokens" in OPERATIONS
    assert "32768                2048    0                  201    7" in OPERATIONS
    assert "ends near 12,600 tokens with full attention; with a budget of 3072" in README
    assert "full 40,960, three at once ([the configuration](configs/reasoning-24gb.yaml))" in README


def test_the_readmes_requests_at_once_are_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "tests" / "tools" / "configs" / "llama-3.1-8b.json")
    fit = []
    for budget in (4096, 2048):
        words = ["--gpu-memory", "24", "--budget", str(budget), "--length", "16384"]
        assert main(["plan", config, *words]) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1].split()
        assert last[0] == "16384"
        fit += [last[2], last[4]]
    assert fit[0] == fit[2]
    assert (
        f"decodes {fit[0]} requests of 16,384 tokens at once with full attention, {fit[1]} with a "
        f"budget of 4096 and {fit[3]} with 2048"
    ) in README


def test_the_table_of_the_authors_variables_is_generated() -> None:
    assert authors_table() in (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("subcommand", [None, *SUBCOMMANDS])
def test_every_help_fits_a_screen(
    subcommand: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"] if subcommand is None else [subcommand, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_the_readme_is_as_long_as_a_visitor_reads() -> None:
    assert 150 <= len(README.splitlines()) <= 250


def test_the_first_sentence_is_that_of_the_result_file() -> None:
    """Its four numbers are those of one row of the table, which is generated from the file."""
    first = next(line for line in README.splitlines() if line and not line.startswith("#"))
    (row,) = [line for line in README.splitlines() if line.startswith("| 16k x 4 |")]
    _, _, _, *steps, _, full, compressed = [cell.strip() for cell in row.strip("|").split("|")]
    slow, _, with_rounds = (round(float(step.split()[0])) for step in steps)
    assert (
        f"Four requests of 16,384 tokens hold {compressed} KV blocks while decoding instead of "
        f"{full}, and a decode step takes {with_rounds} ms, rounds included, instead of {slow} ("
    ) in first
