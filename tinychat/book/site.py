"""The site: a hook for mkdocs that turns the chapters into pages.

`mkdocs build` runs each chapter once, at the fast scale unless TINYCHAT_SITE=full, and keeps the
outputs in .cache/site until the code changes. A cell that fails stops the build.
"""

import html
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from tinychat.book import cache, cards, pages, report, vendor, widgets
from tinychat.book.chapter import BookError, Chapter, chapter_paths, load
from tinychat.book.execute import execute
from tinychat.book.notebooks import dump, installer, notebook
from tinychat.book.render import link_chapters, render
from tinychat.runtime.errors import TinychatError

log = logging.getLogger("mkdocs.hooks.tinychat")

FULL = "TINYCHAT_SITE"  # environment variable; `full` runs the chapters at their full scale
MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)
# Pages that are written by hand, where they exist: title and file.
MORE = (("How it compares", "compare.md"), ("Lab notes", "lab_notes.md"))
AFTER = (("Playground", "playground.md"), ("Glossary", "glossary.md"))

_widgets: dict[str, dict[str, Any]] = {}  # of this build: on_files makes them, the pages show them


def on_config(config: Any) -> Any:
    """Put the chapters into the navigation, in their order."""
    root = _root(config)
    chapters = _chapters(root)
    docs = Path(config.docs_dir)

    def there(entries: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
        return [{title: name} for title, name in entries if (docs / name).exists()]

    config.nav = [
        {
            "The book": [
                {"Start here": "index.md"},
                *({f"{c.number:02} {pages.title(c)}": f"{pages.stem(c)}.md"} for c in chapters),
                *there(AFTER),
            ]
        },
        {
            "The package": [
                {"Modules": "api/index.md"},
                *({f"tinychat.{c.module}": f"api/{c.module}.md"} for c in chapters if c.exported),
            ]
        },
        {
            "The models": [
                {"Report card": "report_card.md"},
                {"Model cards": "model_card.md"},
                *there(MORE),
            ]
        },
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made: chapters with their outputs, reference, cards."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    root = _root(config)
    home = root / ".cache" / "site"
    try:
        made: dict[str, str | bytes] = dict(vendor.files(vendor.install(home)))
        chapters = _chapters(root)
        for chapter in chapters:
            made |= _chapter_files(chapter, chapters, root, config)
        made["api/index.md"] = pages.reference_index(chapters)
        for chapter in chapters:
            if chapter.exported:
                made[f"api/{chapter.module}.md"] = pages.reference(chapter)
        shipped, stems = root / "checkpoints", [pages.stem(chapter) for chapter in chapters]
        made["report_card.md"] = link_chapters(report.report_card(shipped), stems, "")
        made["model_card.md"] = link_chapters(cards.model_cards(shipped), stems, "")
        texts = [
            path.read_text(encoding="utf-8") for path in Path(config.docs_dir).glob("*.[mp][dy]")
        ]
        _widgets.clear()
        _widgets.update(widgets.make(root, home, widgets.wanted(texts)))
        for name, widget in _widgets.items():
            path = f"assets/widgets/data-{widgets.DATA[name]}.js"
            made[path] = widgets.script(name, widget["data"])
    except (BookError, TinychatError) as error:
        raise PluginError(str(error)) from None
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put widgets in their places, and let hand-written pages link to chapters by their file."""
    from mkdocs.exceptions import PluginError

    markdown = re.sub(r"(\]\((?:\.\./)*\d\d_\w+)\.py(?=[)#])", r"\1.md", markdown)
    try:
        return widgets.expand(markdown, _widgets, "../" * page.file.src_uri.count("/"))
    except KeyError as error:
        there = ", ".join(widgets.DATA)
        raise PluginError(f"{page.file.src_uri}: no widget {error}; there are {there}") from None


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Set the formulas of a page, keep code out of the search, and let the keyboard scroll."""
    from mkdocs.exceptions import PluginError

    # People search for words. With all code and all outputs the index, which each page loads, would
    # be three times as large; the reference still finds every name.
    content = re.sub(
        r'<div class="([^"]*\bhighlight)"', r'<div data-search-exclude class="\1"', content
    )
    # A long output scrolls in a frame of its own; an empty corner of a table is nobody's heading.
    content = re.sub(r"(<div [^>]*\blong\b[^>]*>\s*<pre)", r'\1 tabindex="0"', content)
    content = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", content)
    found = [(html.unescape(m[2])[2:-2].strip(), m[1] == "div") for m in MATH.finditer(content)]
    if not found:
        return content
    home = _root(config) / ".cache" / "site"
    try:
        ready = iter(vendor.formulas(vendor.install(home), found, home))
    except BookError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None

    def put(match: re.Match[str]) -> str:
        tag = match[1]
        return f'<{tag} class="formula" data-search-exclude>{next(ready)}</{tag}>'

    # Only pages with formulas load what they need.
    style = files.get_file_from_path("assets/vendor/katex/katex.min.css").url_relative_to(page.file)
    return f'<link rel="stylesheet" href="{style}">\n' + MATH.sub(put, content)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Name what the theme leaves unnamed for screen readers."""
    output = output.replace('role="dialog"', 'role="dialog" aria-label="Search"', 1)
    for number, section in enumerate(config.nav, 1):
        (title,) = section
        name = f'aria-label="Pages of: {html.escape(title)}"'
        output = output.replace(f'aria-labelledby="__nav_{number}_label"', name)
    return output


def _chapter_files(
    chapter: Chapter, chapters: list[Chapter], root: Path, config: Any
) -> dict[str, str | bytes]:
    """Return the page, the pictures and the notebook of a chapter by their paths in the site."""
    fast = os.environ.get(FULL) != "full"

    def run(chapter: Chapter) -> cache.Outputs:
        start = time.perf_counter()
        outputs = execute(chapter, root, fast=fast)
        log.info(f"ran {chapter.path} in {time.perf_counter() - start:.0f} s")
        return outputs

    outputs = cache.outputs(chapter, root, root / ".cache" / "site", fast=fast, run=run)
    stem = pages.stem(chapter)
    page = render(chapter, outputs, _intro(chapter, config, fast))
    markdown = link_chapters(page.markdown, [pages.stem(c) for c in chapters], stem)
    first = [installer(config.repo_url)] if config.repo_url else []
    return {
        f"{stem}.md": markdown,
        f"notebooks/{stem}.ipynb": dump(notebook(chapter, first)),
        **page.files,
    }


def _intro(chapter: Chapter, config: Any, fast: bool) -> str:
    """Return the line of buttons below a chapter's summary, and how its outputs came about."""
    stem = pages.stem(chapter)
    buttons = [f"[Notebook](notebooks/{stem}.ipynb){{ .md-button download }}"]
    owner = re.match(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?$", config.repo_url or "")
    if owner:
        # The workflow publishes the site on this branch, so the notebooks lie there too.
        place = f"{owner[1]}/blob/gh-pages/notebooks/{stem}.ipynb"
        colab = f"https://colab.research.google.com/github/{place}"
        buttons.append(f"[Open in Colab]({colab}){{ .md-button }}")
    if chapter.exported:
        buttons.append(f"[tinychat.{chapter.module}](api/{chapter.module}.md){{ .md-button }}")
    scale = (
        "small scale (`TINYCHAT_FAST=1`), so trainings are shorter than when you run it yourself"
        if fast
        else "full scale"
    )
    note = f"Every output on this page was computed when the page was built, at {scale}."
    return f"{' '.join(buttons)}\n{{ .buttons }}\n\n{note}\n{{ .scale }}"


def _root(config: Any) -> Path:
    return Path(config.config_file_path).resolve().parent


def _chapters(root: Path) -> list[Chapter]:
    from mkdocs.exceptions import PluginError

    try:
        return [load(path) for path in chapter_paths(root)]
    except BookError as error:
        raise PluginError(str(error)) from None
