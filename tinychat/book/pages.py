"""Pages that no chapter holds: the package's reference."""

import ast
from collections.abc import Iterator, Sequence

from tinychat.book.chapter import Chapter
from tinychat.book.export import Module
from tinychat.book.export import render as render_module
from tinychat.book.notebooks import prose


def title(chapter: Chapter) -> str:
    """Return a chapter's title, without its number."""
    first = next(cell for cell in chapter.cells if cell.kind == "markdown")
    line = next(line for line in prose(first).split("\n") if line.startswith("# "))
    return line.removeprefix("# ").strip()


def stem(chapter: Chapter) -> str:
    """Return the name of a chapter's page without its ending: `05_attention`."""
    return chapter.file_name.removesuffix(".py")


def reference(chapter: Chapter) -> str:
    """Return the reference page of a chapter's module: what it exports, then its whole source.

    Each name links to the cell that builds it and to its line below.
    """
    module = render_module(chapter)
    name = f"tinychat.{chapter.module}"
    built = f"chapter {chapter.number:02}, [{title(chapter)}](../{stem(chapter)}.md)"
    parts = [f"# {name}", f"{chapter.summary}\n{{ .summary }}", f"Built in {built}."]
    for public, line in public_names(module):
        cell = f"../{stem(chapter)}.md#L{_cell_line(module, line)}"
        parts.append(f"::: {name}.{public}")
        parts.append(f"[Built here]({cell}) · [line {line}](#L-{line})\n{{ .origin }}")
    parts += [f"## {chapter.module_path}", source(module.text)]
    return "\n\n".join(parts) + "\n"


def reference_index(chapters: Sequence[Chapter]) -> str:
    """Return the page that lists the modules."""
    rows = [
        f"| [`tinychat.{c.module}`]({c.module}.md) | {c.summary} | "
        f"[{c.number:02} {title(c)}](../{stem(c)}.md) |"
        for c in chapters
        if c.exported
    ]
    return "\n".join(
        [
            "# The package",
            "",
            "Each module is made from the chapter of its name, word for word: to change one, edit "
            "the chapter and run `python -m tinychat.book export`.",
            "{ .summary }",
            "",
            "| module | what it does | built in |",
            "| --- | --- | --- |",
            *rows,
            "",
            "The folders `tinychat/data`, `runtime`, `cli` and `book` are written by hand and "
            "explained where they stand.",
            "",
        ]
    )


def public_names(module: Module) -> Iterator[tuple[str, int]]:
    """Yield each public name that a module defines at its top, with its line."""
    for node in ast.parse(module.text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # Decorators stand above the line that the tree calls the definition's.
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, line = [t.id for t in targets if isinstance(t, ast.Name)], node.lineno
        else:
            continue
        yield from ((name, line) for name in names if not name.startswith("_"))


def source(text: str) -> str:
    """Return a listing whose lines can be linked to: line 17 is `#L-17`."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    # pygments closes its marks at the end of each line, so a line can be wrapped on its own.
    lines = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    wrapped = "".join(f'<span id="L-{i}">{line}\n</span>' for i, line in enumerate(lines, 1))
    return (
        '<div class="highlight listing" data-search-exclude><pre tabindex="0"><code>'
        f"{wrapped}</code></pre></div>"
    )


def _cell_line(module: Module, line: int) -> int:
    """Return the module line at which the cell that holds `line` begins."""
    start = module.where(line)
    cell = next(c for c in module.chapter.exported if c.line <= start < c.line + c.lines)
    return module.origin.index(cell.line) + 1
