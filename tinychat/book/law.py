"""The law of the book, read off the syntax tree: who may import whom, and no name twice."""

import ast
from collections.abc import Iterator, Sequence

from tinychat.book.chapter import Cell, Chapter

HAND_WRITTEN = ("data", "runtime")  # folders that a chapter may import
FACE = ("__version__",)  # names of `tinychat` itself that a chapter may import
PICTURE = "tinychat.book.picture"  # draws what a chapter shows, so the package never needs it


def problems(chapters: Sequence[Chapter]) -> Iterator[str]:
    """Yield one sentence for each broken rule, with its chapter line."""
    number = {chapter.module: chapter.number for chapter in chapters if chapter.exported}
    for chapter in chapters:
        trees: list[tuple[Cell, ast.Module]] = []
        for cell in chapter.cells:
            if cell.kind != "code":
                continue
            try:
                trees.append((cell, ast.parse(cell.source)))
            except SyntaxError as error:
                line = cell.line + (error.lineno or 1) - 1
                yield f"{chapter.path}:{line}: {error.msg}"
        yield from _imports(chapter, trees, number)
        yield from _names(chapter, trees)


def _imports(
    chapter: Chapter, trees: list[tuple[Cell, ast.Module]], number: dict[str, int]
) -> Iterator[str]:
    first = chapter.exported[0] if chapter.exported else None
    for cell, tree in trees:
        for node in ast.walk(tree):
            place = f"{chapter.path}:{cell.line + getattr(node, 'lineno', 1) - 1}"
            if (
                isinstance(node, ast.Import | ast.ImportFrom)
                and cell.exported
                and cell is not first
            ):
                yield f"{place}: the first exported cell holds all imports; move this one there"
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{place}: imports are absolute; write `from tinychat.name import ...`"
            for name in _imported(node):
                shown = not cell.exported and name.startswith(PICTURE)
                if not shown and (reason := _forbidden(name, chapter, number)):
                    yield f"{place}: {reason}"


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield dotted names: `from tinychat import gpt` counts as `tinychat.gpt`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        if node.module == "tinychat":
            yield from (f"tinychat.{alias.name}" for alias in node.names)
        elif node.module:
            yield node.module
    elif isinstance(node, ast.Call) and node.args:
        # The other two spellings, where they name the module in plain sight.
        called = ast.unparse(node.func).rpartition(".")[2]
        value = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
        if called in ("import_module", "__import__") and isinstance(value, str):
            yield value


def _forbidden(name: str, chapter: Chapter, number: dict[str, int]) -> str | None:
    package, _, rest = name.partition(".")
    module = rest.partition(".")[0]
    if package != "tinychat" or module in HAND_WRITTEN or module in FACE:
        return None
    if not module:
        return "name the module: `import tinychat` alone hides which chapter is used"
    if module == chapter.module:
        return f"a chapter never imports its own module, tinychat.{module}"
    if module not in number:
        return f"a chapter imports earlier chapters, tinychat.data and tinychat.runtime, not {name}"
    # A chapter that exports nothing (the tour of chapter 00) can't close a circle of imports.
    if chapter.exported and number[module] >= chapter.number:
        return f"a chapter imports earlier ones only, and {name} is chapter {number[module]:02}"
    return None


def _names(chapter: Chapter, trees: list[tuple[Cell, ast.Module]]) -> Iterator[str]:
    # An exported name bound again elsewhere in the chapter would make the chapter run other code
    # than the module does, so cells without the tag count too.
    exported: dict[str, int] = {}
    for cell, tree in trees:
        if cell.exported:
            for name, line in _bound(tree):
                line += cell.line - 1
                if name in exported and name != "_":
                    place = f"{chapter.path}:{line}"
                    yield f"{place}: {name!r} is exported at line {exported[name]} too"
                exported.setdefault(name, line)
    for cell, tree in trees:
        if not cell.exported:
            for name, line in _bound(tree):
                if name in exported and name != "_":
                    yield (
                        f"{chapter.path}:{line + cell.line - 1}: {name!r} is the exported name of "
                        f"line {exported[name]}; call this one otherwise"
                    )


def _bound(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names that functions, classes and assignments bind at the top of a cell."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not any(ast.unparse(d).endswith("overload") for d in node.decorator_list):
                yield node.name, node.lineno
        elif isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        yield part.id, node.lineno
