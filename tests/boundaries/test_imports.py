"""Which package may import what; read from the source, so that lazy imports count too."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "triattention_vllm"
KERNELS = ROOT / "kernels" / "triattention_kernels"
METHOD, ENGINE, TOOLS = PLUGIN / "method", PLUGIN / "engine", PLUGIN / "tools"
TOP = sorted(PLUGIN.glob("*.py"))


def imported(path: Path, at_import_only: bool = False) -> set[str]:
    """Dotted names that a file imports; with ``at_import_only`` outside functions alone, and
    not under ``if TYPE_CHECKING``."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        pending.extend(ast.iter_child_nodes(node))
    return names


def roots(path: Path, at_import_only: bool = False) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path, at_import_only)}


def third_party(path: Path, at_import_only: bool = False) -> set[str]:
    return {name for name in roots(path, at_import_only) if name not in sys.stdlib_module_names}


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_there_are_sources_in_every_package() -> None:
    for folder in (PLUGIN, KERNELS, METHOD, ENGINE, TOOLS):
        assert sources(folder), shown(folder)


@pytest.mark.parametrize("path", sources(KERNELS), ids=shown)
def test_kernels_import_only_torch_and_in_kernel_files_triton(path: Path) -> None:
    allowed = {"torch", "triattention_kernels"}
    if path.stem.endswith("_triton"):
        allowed.add("triton")
    assert third_party(path) <= allowed


@pytest.mark.parametrize("path", sources(METHOD), ids=shown)
def test_the_method_knows_neither_vllm_nor_the_engine(path: Path) -> None:
    assert "vllm" not in roots(path)
    assert "triton" not in roots(path)
    assert not any(
        name.startswith(("triattention_vllm.engine", "triattention_vllm.tools"))
        for name in imported(path)
    )


def test_decisions_are_integers_without_torch() -> None:
    assert third_party(METHOD / "policy.py") <= {"triattention_vllm"}
    own = {name for name in imported(METHOD / "policy.py") if name.startswith("triattention_vllm")}
    assert all(name.startswith("triattention_vllm.errors") for name in own)


@pytest.mark.parametrize("path", TOP, ids=shown)
def test_settings_errors_and_plugin_need_the_standard_library_alone(path: Path) -> None:
    assert third_party(path, at_import_only=True) <= {"triattention_vllm"}
    assert "vllm" not in roots(path)


def test_the_entry_point_imports_nothing_before_it_is_called() -> None:
    assert imported(PLUGIN / "plugin.py", at_import_only=True) == set()


def test_only_the_engine_imports_vllm() -> None:
    outside = [path for path in sources(PLUGIN) if not path.is_relative_to(ENGINE)]
    importing = [path for path in outside if "vllm" in roots(path)]
    assert importing == []


@pytest.mark.parametrize("path", sources(TOOLS), ids=shown)
def test_tools_reach_the_engine_only_when_they_run(path: Path) -> None:
    assert "vllm" not in roots(path, at_import_only=True)
    assert not any(
        name.startswith("triattention_vllm.engine") for name in imported(path, at_import_only=True)
    )


def is_everything(caught: str) -> bool:
    """Whether a clause catches everything, alone or among others."""
    return caught == "" or bool({"Exception", "BaseException"} & set(re.split(r"[(), ]+", caught)))


def without_the_reader_of_models_fields(path: Path) -> ast.Module:
    """A file's code; the one function that may ask whether an attribute exists is left out:
    configurations of models differ in which fields they have."""
    tree = ast.parse(path.read_text())
    if path == TOOLS / "model_shape.py":
        (reader,) = (
            node
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name == "_field"
        )
        tree.body.remove(reader)
    return tree


CODE = [path for name in ("benchmarks", "tests") for path in sources(ROOT / name)]


@pytest.mark.parametrize("path", sources(PLUGIN) + sources(KERNELS) + CODE, ids=shown)
def test_no_file_catches_everything_or_guesses_attributes(path: Path) -> None:
    for node in ast.walk(without_the_reader_of_models_fields(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            raises_again = ast.unparse(node.body[-1]) == "raise"
            assert raises_again or not is_everything(caught), (
                f"line {node.lineno}: except {caught} without raising again"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            assert len(node.args) == 2, f"line {node.lineno}: getattr with a default"
        if isinstance(node, ast.Call):
            called = ast.unparse(node)
            assert not called.startswith("hasattr("), f"line {node.lineno}: hasattr"
            suppressed = re.match(r"(contextlib\.)?suppress\((.*)\)", called)
            assert not suppressed or not is_everything(suppressed[2]), (
                f"line {node.lineno}: {called}"
            )


COLD = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked in this test")

sys.meta_path.insert(0, Blocked())
{code}
"""


def run_cold(blocked: set[str], code: str) -> str:
    """Run ``code`` in a fresh Python in which ``blocked`` packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(blocked=blocked, code=code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_imports_without_vllm_and_triton() -> None:
    code = (
        "import triattention_vllm as package\n"
        "package.Statistics, package.Settings()\n"
        "print(*sorted(package.__all__))"
    )
    assert run_cold({"vllm", "triton"}, code) == (
        "RoundError SeamError Settings SettingsError Statistics StatisticsError "
        "TriAttentionError UnsupportedError __version__"
    )


def test_finding_the_plugin_costs_neither_torch_nor_vllm() -> None:
    code = "import triattention_vllm.plugin as plugin; print(callable(plugin.register))"
    assert run_cold({"vllm", "triton", "torch", "safetensors", "numpy"}, code) == "True"


def test_the_cpu_install_command_starts_without_torch_and_vllm() -> None:
    code = (
        "from triattention_vllm.tools.main import build_parser\n"
        "print(build_parser('cpu-install').parse_args(['cpu-install']).subcommand)"
    )
    assert run_cold({"vllm", "triton", "torch", "safetensors", "numpy"}, code) == "cpu-install"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    import triattention_vllm

    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        triattention_vllm.Engine  # noqa: B018
