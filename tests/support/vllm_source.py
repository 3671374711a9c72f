"""A vLLM that is read and not imported: its modules as syntax trees, from a wheel or a folder.

Answers what the table of ``docs/seams.md`` asks of a symbol, for release lines that cannot be
installed here. The same reading of the installed vLLM must agree with what the import finds.
"""

import ast
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PROPERTIES = {"property", "cached_property", "functools.cached_property"}


class Source:
    """``vllm`` under ``root``: a wheel, or the folder that contains the package."""

    def __init__(self, root: Path) -> None:
        if root.is_dir():
            self._files = {
                str(path.relative_to(root)): path for path in (root / "vllm").rglob("*.py")
            }
        else:
            wheel = zipfile.ZipFile(root)
            self._files = {name: zipfile.Path(wheel, name) for name in wheel.namelist()}
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in self._files:
                return ast.parse(self._files[name].read_text(encoding="utf-8"))
        return None

    def _is_package(self, module: str) -> bool:
        return f"{module.replace('.', '/')}/__init__.py" in self._files

    def define(self, module: str, name: str) -> tuple[str, Definition] | None:
        """(module, node) that defines a top-level name, imports followed; None where absent."""
        tree = self.tree(module)
        if tree is None:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name == name:
                    return module, node
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                if name in _names(node):
                    return module, node
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        wanted = name if alias.name == "*" else alias.name
                        found = self.define(self._absolute(module, node), wanted)
                        if found is not None:
                            return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return str(node.module)
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self._is_package(module)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def classes(self, module: str, name: str) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases inside vLLM, nearest first."""
        found = self.define(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        module, node = found
        yield module, node
        for base in node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                yield from self.classes(module, plain.id)

    def members(self, module: str, name: str, member: str) -> Iterator[Definition]:
        """What the class and its bases define under a name, nearest first."""
        for _, node in self.classes(module, name):
            for statement in _statements(node.body):
                if isinstance(statement, Definition) and member in _names(statement):
                    yield statement

    def function(self, module: str, qualname: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The function or method of a name, or None."""
        owner, _, member = qualname.rpartition(".")
        if owner:
            found = next(self.members(module, owner, member), None)
        else:
            found = (self.define(module, member) or (module, None))[1]
        return found if isinstance(found, FUNCTIONS) else None

    def has(self, kind: str, module: str, qualname: str) -> bool:
        """Whether the symbol is there and is what ``docs/seams.md`` calls ``kind``."""
        owner, _, member = qualname.rpartition(".")
        match kind:
            case "class":
                return next(self.classes(module, qualname), None) is not None
            case "function":
                return self.function(module, qualname) is not None
            case "constant" if not owner:
                _, node = self.define(module, member) or (module, None)
                return isinstance(node, ast.Assign | ast.AnnAssign)
            case "constant":
                nearest = next(self.members(module, owner, member), None)
                return isinstance(nearest, ast.Assign | ast.AnnAssign)
            case "method":
                method = self.function(module, qualname)
                return method is not None and not _is_property(method)
            case "property":
                method = self.function(module, qualname)
                return method is not None and _is_property(method)
            case "field":
                return any(
                    isinstance(m, ast.AnnAssign) for m in self.members(module, owner, member)
                )
            case "attribute":
                return self._assigns_attribute(module, owner, member)
            case "parameter":
                function = self.function(module, owner)
                return function is not None and member in [p.arg for p in _arguments(function)]
            case "assignment":
                function = self.function(module, owner)
                return function is not None and any(
                    attribute == member and of != "self" for of, attribute in _assigned(function)
                )
        raise ValueError(f"kind {kind!r} is not one of the table's")

    def _assigns_attribute(self, module: str, owner: str, name: str) -> bool:
        for _, node in self.classes(module, owner):
            annotated = [s for s in node.body if isinstance(s, ast.AnnAssign)]
            if any(name in _names(statement) for statement in annotated):
                return True
            if ("self", name) in _assigned(node) or name in _buffers(node):
                return True
        return False

    def parameters(self, module: str, qualname: str) -> tuple[str, ...] | None:
        """Parameters of a function or method as a call sees them, without ``cls``: the name,
        ``=`` behind those with a default, ``*`` in front of those that only go by name."""
        function = self.function(module, qualname)
        if function is None:
            return None
        given = function.args
        positional = [*given.posonlyargs, *given.args]
        first_default = len(positional) - len(given.defaults)
        words = [
            f"{parameter.arg}{'=' if index >= first_default else ''}"
            for index, parameter in enumerate(positional)
        ]
        if "classmethod" in [ast.unparse(decorator) for decorator in function.decorator_list]:
            del words[0]
        if given.vararg:
            words.append(f"*{given.vararg.arg}")
        elif given.kwonlyargs:
            words.append("*")
        for parameter, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            words.append(f"{parameter.arg}{'=' if default else ''}")
        if given.kwarg:
            words.append(f"**{given.kwarg.arg}")
        return tuple(words)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those under ``if``, ``else``, ``try`` and ``with`` included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for _, block in ast.iter_fields(statement):
                if isinstance(block, list):
                    yield from _statements([s for s in block if isinstance(s, ast.stmt)])


def _names(node: Definition) -> list[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return [node.name]
    return [
        part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
    ]


def _is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) in PROPERTIES for decorator in function.decorator_list)


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def _assigned(tree: ast.AST) -> set[tuple[str, str]]:
    """(object, attribute) of every assignment and annotation to an attribute."""
    found = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                    found.add((part.value.id, part.attr))
    return found


def _buffers(tree: ast.AST) -> set[str]:
    return {
        str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "self.register_buffer"
        and isinstance(node.args[0], ast.Constant)
    }
