"""The documents name only what exists: files, tests and symbols."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
    if path.exists()
]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FILE_IN_BACKTICKS = re.compile(r"`([\w./-]+\.(?:py|md|toml))`")
TEST_NAME = re.compile(r"\btest_\w+\b(?!\.py|/)")
SYMBOL = re.compile(r"`([A-Za-z_][\w.]*)`")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def relative_links(document: Path) -> list[tuple[str, Path]]:
    """(text, file) of every link that is not an address; anchors inside a document left out."""
    targets = [(text, target.split("#")[0]) for text, target in LINK.findall(prose(document))]
    return [
        (text, document.parent / target)
        for text, target in targets
        if target and not re.match(r"[a-z]+:", target)
    ]


@cache
def definitions(path: Path) -> set[str]:
    """Dotted names of the classes, functions, constants and fields that a file defines."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)
            if isinstance(node, ast.Assign):
                names = [target for target in node.targets if isinstance(target, ast.Name)]
                found.update(prefix + name.id for name in names)

    visit(ast.parse(path.read_text()).body, "")
    return found


@cache
def known_tests() -> set[str]:
    """Names of all functions under tests."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    return {
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_there_are_documents() -> None:
    assert {"docs/architecture.md", "docs/method.md", "docs/seams.md"} <= set(map(shown, DOCUMENTS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    missing = [str(path) for _, path in relative_links(document) if not path.exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_symbol_that_is_a_link_is_defined_where_it_leads(document: Path) -> None:
    missing = [
        f"{text} in {shown(path.resolve())}"
        for text, path in relative_links(document)
        if path.suffix == ".py"
        and (symbol := SYMBOL.fullmatch(text))
        and not symbol[1].endswith(".py")
        and symbol[1] not in definitions(path.resolve())
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    named = set(TEST_NAME.findall(prose(document)))
    assert sorted(named - known_tests()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=shown)
def test_every_file_in_backticks_exists(document: Path) -> None:
    """Named from the root of the repository, or from the document's own folder; a bare name may
    also be the text of a link, which is checked as a link."""
    text = prose(document)
    linked = {path.name for _, path in relative_links(document)}
    missing = [
        name
        for name in FILE_IN_BACKTICKS.findall(text)
        if not (ROOT / name).exists()
        and not (document.parent / name).exists()
        and name not in linked
    ]
    assert missing == []


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    """The patterns see what they are meant to see."""
    document = tmp_path / "page.md"
    document.write_text(
        "[a](gone.md) [`Gone`](here.py) `gone/file.py` test_that_is_gone `test_gone.py`\n"
        "```\n[b](in_a_block.md)\n```\n[c](https://example.org) [d](#anchor)\n"
    )
    (tmp_path / "here.py").write_text("class Here:\n    field: int = 0\n")
    assert [path.name for _, path in relative_links(document)] == ["gone.md", "here.py"]
    assert definitions(tmp_path / "here.py") == {"Here", "Here.field"}
    assert TEST_NAME.findall(prose(document)) == ["test_that_is_gone"]
    assert FILE_IN_BACKTICKS.findall(prose(document)) == ["gone/file.py", "test_gone.py"]


def test_what_processes_of_a_soak_hold_is_that_of_the_result_files() -> None:
    """Engine core and worker hold what they held; the API server grows on both sides."""
    documented = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    reports = [
        json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        for name in ("soak_stock_cpu.json", "soak_cpu.json")
    ]
    rows = {"engine core": "EngineCore", "worker": "Worker", "API server": "vllm serve"}
    for row, process in rows.items():
        cells = []
        for report in reports:
            (found,) = (held for name, held in report["processes"].items() if process in name)
            held = found["in_use_mib"]
            assert held["is_flat"] == (row != "API server")
            cells.append(f"{held['first_part']:.1f} -> {held['last_part']:.1f}")
        assert f"| {row} | {cells[0]} | {cells[1]} |" in documented
