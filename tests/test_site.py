"""The site: chapters become pages with their outputs, errors stop it, widgets count right."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinychat.book import cache, notebooks, pages, render, site, vendor, widgets
from tinychat.book.__main__ import main
from tinychat.book.chapter import BookError, load, parse
from tinychat.book.execute import environment, execute, plain

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))
SVG = '<svg width="504pt" height="252pt" viewBox="0 0 504 252"></svg>'

ALPHA = '''\
# %% [markdown]
# # Alpha
#
# Count to three.
#
# There are two reasons:
# - it is short;
# - `chapter 02` and chapter 02 follow.
#
# $$a^2 + b^2 = c^2$$
#
# <!-- widget: pixels -->

# %% tags=["export"]
import warnings

# %% tags=["export"]
LIMIT = 3
"""how far to count"""


def count() -> list[int]:
    """Return the numbers below LIMIT."""
    return list(range(LIMIT))


# %%
warnings.warn("nobody should read this")
print("counted", count())

# %% tags=["test"]
assert count() == [0, 1, 2]

# %% tags=["solution"]
print("the solution says", sum(count()))
'''

BETA = """\
# %% [markdown]
# # Beta
#
# Draw what Alpha counted.

# %%
from tinychat.book.picture import picture

# %%
# alt: A line that rises from zero to two.
def draw(plt):
    figure, axis = plt.subplots()
    axis.plot([0, 1, 2])
    return figure


picture("02_line", draw)
"""


def code(text: str, name: str = "01_alpha.py") -> list[str]:
    return [cell.source for cell in parse(text, name).cells if cell.kind == "code"]


# ---- pages -----------------------------------------------------------------------------------


def test_a_page_shows_what_the_cells_showed():
    chapter = parse(ALPHA, "01_alpha.py")
    outputs = [[], [], [{"text/plain": "counted [0, 1, 2]\n"}], [], [{"text/plain": "sum 3"}]]
    page = render.render(chapter, outputs, intro="[Notebook](x.ipynb)")
    text = page.markdown
    assert text.startswith("# Alpha\n\nCount to three.\n{ .summary }\n\n[Notebook](x.ipynb)\n")
    assert "reasons:\n\n- it is short" in text  # mkdocs needs the blank line, Jupyter doesn't
    assert "``` { .text .output .no-copy }\ncounted [0, 1, 2]\n```" in text
    assert '??? test "Test: what must hold here"\n\n    ``` python\n    assert count()' in text
    solution = text.partition('??? solution "Solution"')[2]
    assert "    sum 3" in solution and "sum 3" not in text.partition("??? solution")[0]


def test_an_exported_cell_names_its_line_in_the_module():
    chapter = parse(ALPHA, "01_alpha.py")
    module = render.render_module(chapter).text.split("\n")
    text = render.render(chapter, [[]] * 5).markdown
    lines = [int(line) for line in re.findall(r"\(api/alpha\.md#L-(\d+)\)", text)]
    assert [module[line - 1] for line in lines] == ["import warnings", "LIMIT = 3"]
    reference = pages.reference(chapter)
    linked = dict(re.findall(r"::: tinychat\.alpha\.(\w+)\n\n.*?\(#L-(\d+)\)", reference))
    assert module[int(linked["count"]) - 1].startswith("def count")
    for line in linked.values():
        assert f'id="L-{line}"' in reference
    for line in re.findall(r"01_alpha\.md#L(\d+)", reference):
        assert f"#L{line} }}" in text  # the cell that the reference links back to


def test_a_picture_needs_words_and_hides_its_alt_line():
    chapter = parse(BETA, "02_beta.py")
    page = render.render(chapter, [[], [{"image/svg+xml": SVG}]])
    want = "![A line that rises from zero to two.](pictures/02_beta-1.svg)"
    assert f'{want}{{ .picture width="672" height="336" loading=lazy }}' in page.markdown
    assert "# alt:" not in page.markdown and page.files == {"pictures/02_beta-1.svg": SVG.encode()}
    silent = parse(BETA.replace("# alt: ", "# "), "02_beta.py")
    with pytest.raises(BookError, match=r"02_beta\.py:10: this cell shows a picture"):
        render.render(silent, [[], [{"image/svg+xml": SVG}]])


def test_a_large_drawing_becomes_a_png():
    png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (1400).to_bytes(4, "big") + (700).to_bytes(4, "big")
    large = SVG.replace("></svg>", ">" + " " * render.LARGE_SVG + "</svg>")
    shown = {"image/svg+xml": large, "image/png": base64.b64encode(png).decode()}
    page = render.render(parse(BETA, "02_beta.py"), [[], [shown]])
    assert page.files == {"pictures/02_beta-1.png": png}
    assert 'width="700" height="350"' in page.markdown


def test_fences_hold_fences():
    assert render.fence("a\n```\nb", "python") == "```` python\na\n```\nb\n````"
    assert render.fence("a `b`", "python") == "``` python\na `b`\n```"


def test_chapters_and_modules_are_linked_in_prose_only():
    stems = ["01_alpha", "02_beta"]
    text = "See chapter 02, chapter 02, `chapter 02`, `tinychat.beta`, chapter 01, chapter 99."
    assert render.link_chapters(text, stems, "01_alpha") == (
        "See [chapter 02](02_beta.md), chapter 02, `chapter 02`, "
        "[`tinychat.beta`](api/beta.md), chapter 01, chapter 99."
    )
    for kept in ("# Chapter 02", "``` python\nchapter 02\n\nchapter 02\n```", "[chapter 02](x)"):
        assert render.link_chapters(kept, stems, "01_alpha") == kept


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_prose_reads_the_same_here_and_in_jupyter(path):
    """mkdocs' Markdown differs from Jupyter's: lists and headings must come out as many."""
    markdown = pytest.importorskip("markdown")
    commonmark = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    for cell in load(path).cells:
        if cell.kind == "markdown":
            text = notebooks.prose(cell)
            ours = markdown.markdown(
                render.blocks(text), extensions=["tables", "fenced_code", "md_in_html"]
            )
            theirs = commonmark.render(text)
            for tag in ("<li", "<ul", "<ol", "<h2", "<h3", "<tr", "<pre", "<blockquote"):
                assert ours.count(tag) == theirs.count(tag), f"{path.name}:{cell.line}: {tag}>"


# ---- notebooks -------------------------------------------------------------------------------


def test_notebooks_are_what_jupytext_makes(tmp_path, capsys):
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    assert main(["--root", str(ROOT), "notebooks", "--out", str(tmp_path / "books")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CHAPTERS)
    for path in CHAPTERS:
        book = nbformat.read(tmp_path / "books" / f"{path.stem}.ipynb", as_version=4)
        nbformat.validate(book)
        ours = [(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in book.cells]
        theirs = jupytext.read(path).cells
        assert ours == [
            (c.cell_type, c.source.strip(), sorted(c.metadata.get("tags", [])))
            for c in theirs
            if c.source.strip()
        ]


def test_a_notebook_fetches_the_package_where_it_is_missing():
    cell = notebooks.installer("https://github.com/someone/tinychat")
    book = notebooks.notebook(parse(ALPHA, "01_alpha.py"), [cell])
    first = "".join(book["cells"][0]["source"])
    assert (
        '%pip install -q "tinychat[notebooks] @ git+https://github.com/someone/tinychat"' in first
    )


# ---- the cache -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """A repository with a module that reads the corpus and one that doesn't."""
    for name, text in {
        "tinychat/__init__.py": "",
        "tinychat/alone.py": "import json",
        "tinychat/reader.py": "from tinychat.data import corpus",
        "tinychat/data/__init__.py": "",
        "tinychat/data/corpus.py": "",
        "tinychat/data/corpus/a.jsonl": "{}",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_key_follows_what_the_outputs_stand_on(small):
    def key(source: str, fast: bool = True) -> str:
        return cache.digest(small, [source], fast=fast)

    alone, reader = "import tinychat.alone", "from tinychat import reader"
    before = {source: key(source) for source in (alone, reader)}
    assert key(alone, fast=False) != before[alone] != key(alone + " ")
    (small / "tinychat/data/corpus/a.jsonl").write_text("[]")
    assert key(alone) == before[alone] and key(reader) != before[reader]
    (small / "tinychat/alone.py").write_text("import math")
    assert key(alone) != before[alone]
    middle = key(reader)
    (small / "tinychat/data/corpus.py").write_text("x = 1")  # imported by what it imports
    assert key(reader) != middle


def test_prose_does_not_run_a_chapter_again(tmp_path, small):
    runs = []

    def outputs(text: str) -> cache.Outputs:
        def run(chapter):
            runs.append(chapter.file_name)
            return [[{"text/plain": str(len(runs))}]]

        return cache.outputs(parse(text, "01_alpha.py"), small, tmp_path / "c", fast=True, run=run)

    assert outputs(ALPHA) == outputs(ALPHA.replace("it is short", "it is prose"))
    assert len(runs) == 1
    assert outputs(ALPHA.replace("sum(count())", "max(count())")) == [[{"text/plain": "2"}]]
    (kept,) = (tmp_path / "c").iterdir()
    kept.write_text(kept.read_text()[:40])  # cut off by a full disk
    assert outputs(ALPHA) == [[{"text/plain": "3"}]]


# ---- running ---------------------------------------------------------------------------------


def test_a_terminal_text_becomes_a_page_text():
    assert plain("\x1b[31mred\x1b[0m") == "red"
    assert plain("10 %\r 50 %\r100 %\ndone\r\n") == "100 %\ndone\n"


def test_the_kernel_gets_the_scale_and_this_package():
    made = environment({"PYTHONPATH": "/mine", "MPLBACKEND": "Agg"}, ROOT, fast=False)
    assert made["TINYCHAT_FAST"] == "0" and "MPLBACKEND" not in made
    assert made["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"


def test_a_failing_cell_stops_the_build_and_is_named(tmp_path):
    pytest.importorskip("nbclient")
    text = (
        "# %% [markdown]\n# # T\n\n# %%\nprint(1)\n\n# %%\nraise ValueError('broken on purpose')\n"
    )
    with pytest.raises(BookError, match=r"01_alpha\.py:8: (?s:.*)broken on purpose"):
        execute(parse(text, "01_alpha.py"), tmp_path, fast=True)


# ---- formulas --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packages():
    """The npm packages. CI must have them; elsewhere a machine may lack Node.js or a network."""
    try:
        return vendor.install(ROOT / ".cache" / "site")
    except BookError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def test_formulas_are_set_at_build_time(packages, tmp_path):
    inline, alone = vendor.formulas(packages, [("x_1", False), (r"\frac{a}{b}", True)], tmp_path)
    assert "<math" in inline and "katex-display" in alone  # for screen readers, and for the eye
    (kept,) = tmp_path.iterdir()
    assert vendor.formulas(packages, [("x_1", False)], tmp_path) == [inline]
    assert len(json.loads(kept.read_text())) == 2
    with pytest.raises(BookError, match="can't read the formula"):
        vendor.formulas(packages, [(r"\frac{a", True)], tmp_path)


def test_the_style_of_formulas_loads_only_what_the_site_has(packages):
    files = dict(vendor.files(packages))
    style = files["assets/vendor/katex/katex.min.css"].decode()
    fonts = set(re.findall(r"url\(([^)]+)\)", style))
    assert fonts and all(f"assets/vendor/katex/{font}" in files for font in fonts)


# ---- widgets ---------------------------------------------------------------------------------


def node(script: str, expression: str, given: object) -> object:
    """Evaluate a JavaScript expression; `w` is the widget's module, `x` is `given`."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node.js here")
    path = ROOT / "chapters" / "assets" / "widgets" / script
    source = (
        f"const w = require({json.dumps(str(path))});"
        'const x = JSON.parse(require("fs").readFileSync(0, "utf8"));'
        f"process.stdout.write(JSON.stringify({expression}));"
    )
    answer = subprocess.run(
        [program, "-e", source], input=json.dumps(given), capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return widgets.make(ROOT, tmp_path_factory.mktemp("widgets"), widgets.DATA)


def test_merges_gives_the_tokens_of_the_tokenizer(made):
    from tinychat.data import tokenizer_model
    from tinychat.data.corpus import stories
    from tinychat.tokenizer import Tokenizer

    texts = [
        "The unhappiest baker",
        "",
        " ",
        "two  spaces\n\n\nx",
        "1984",
        "🦊 é 日本",
        "<0x41><|end|>",
    ]
    texts += [document.text[:400] for document in stories()[:20]]
    tokenizer = Tokenizer(tokenizer_model())
    data = made["merges"]["data"]
    ours = node(
        "merges.js", "x[1].map(t => w.encode(x[0], t).tokens.map(t => t.id))", [data, texts]
    )
    assert ours == [tokenizer.encode(text) for text in texts]
    steps = node("merges.js", "w.encode(x[0], x[1]).steps", [data, "lowest"])
    assert [step["before"] for step in steps][0] == list("lowest")
    for step in steps:
        assert data["pieces"][step["rank"]] == step["left"] + step["right"]


def test_sampling_gives_the_distributions_of_the_package(made):
    import torch

    from tinychat.generation import Sampling, filter_logits

    settings = [
        (1, 0, 1),
        (0.5, 0, 1),
        (2, 0, 0.9),
        (1, 5, 1),
        (1, 40, 0.5),
        (0.3, 3, 0.05),
        (0, 0, 1),
    ]
    packed = [prompt["scores"] for prompt in made["sampling"]["data"]]
    scores = node("sampling.js", "x.map(p => Array.from(w.unpack(p)))", packed)
    ours = node(
        "sampling.js",
        "x[0].map(p => x[1].map(([temperature, topK, topP]) =>"
        " Array.from(w.distribution(w.unpack(p), { temperature, topK, topP }))))",
        [packed, settings],
    )
    for logits, of_settings in zip(scores, ours, strict=True):
        for (temperature, top_k, top_p), shares in zip(settings, of_settings, strict=True):
            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
            logits_BV = filter_logits(torch.tensor([logits], dtype=torch.float64), sampling)
            theirs = logits_BV.softmax(dim=-1)[0]
            shares_V = torch.tensor(shares, dtype=torch.float64)
            # Which of two tokens with the same score falls to a cut is nobody's promise.
            torch.testing.assert_close(shares_V.sort().values, theirs.sort().values)
            off = (shares_V - theirs).abs() > 1e-7
            assert len(torch.tensor(logits, dtype=torch.float64)[off].unique()) <= 1


def test_sampling_shows_the_model_s_own_probabilities(made):
    import torch

    from tinychat.gpt import load_model

    model, tokenizer, _ = load_model(ROOT / "checkpoints" / "base.safetensors")
    prompt = made["sampling"]["data"][0]
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt["text"])]])
    with torch.inference_mode():
        best, order = model(ids)[0, -1].softmax(dim=-1).topk(12)
    off = {"temperature": 1, "topK": 0, "topP": 1}
    ours = node(
        "sampling.js", "Array.from(w.distribution(w.unpack(x[0]), x[1]))", [prompt["scores"], off]
    )
    assert prompt["words"][:12] == [tokenizer.piece(int(i)) for i in order]
    assert ours[:12] == pytest.approx(best.tolist(), abs=1e-3)


def test_pixels_gives_the_votes_of_the_network(made):
    import torch

    from tinychat.neural_net import MLP

    data = made["pixels"]["data"]
    network = MLP((9, 8, 8, 4))
    network.parameters = [torch.tensor(part) for layer in data["layers"] for part in layer]
    pictures = (torch.arange(512)[:, None] >> torch.arange(9) & 1) * 2.0 - 1  # all there are
    ours = node(
        "pixels.js",
        "x[1].map(p => w.forward(x[0], p).probabilities)",
        [data["layers"], pictures.tolist()],
    )
    theirs = network.forward(pictures).softmax(dim=1)
    torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=0)
    for name, drawing in zip(data["names"], data["drawings"], strict=True):
        place = node("pixels.js", "w.forward(x[0], x[1]).probabilities", [data["layers"], drawing])
        assert data["names"][place.index(max(place))] == name


def test_attention_shows_the_weights_of_the_model(made):
    import torch

    from tinychat.cli.trace import attention_weights
    from tinychat.gpt import load_model

    model, tokenizer, _ = load_model(ROOT / "checkpoints" / "base.safetensors")
    shown = made["attention"]["data"]["texts"][1]
    ids = [tokenizer.bos_id, *tokenizer.encode(shown["text"])]
    assert shown["tokens"] == [tokenizer.piece(id) for id in ids]
    # The first layer reads the embeddings themselves, so its weights can be had without the trace.
    first = model.blocks[0]
    tables = model.cos_TK[: len(ids)], model.sin_TK[: len(ids)]
    with torch.inference_mode():
        x_BTD = first.attention_norm(model.embed(torch.tensor([ids])))
        weights_HTT = attention_weights(first.attention, x_BTD, *tables)[0]
    rows = node(
        "attention.js",
        "x[0].map(head => x[1].map((_, token) => w.look(head, token)))",
        [shown["layers"][0], ids],
    )
    for head, ours in enumerate(rows):
        for token, row in enumerate(ours):
            theirs = weights_HTT[head, token, : token + 1]
            torch.testing.assert_close(torch.tensor(row).float(), theirs, atol=0.0051, rtol=0)


def test_a_widget_reads_without_scripts(made):
    page = widgets.expand("Try it.\n\n<!-- widget: merges -->\n", made, "../")
    assert '<div class="widget" data-widget="merges"' in page and "<td>1984</td>" in page
    assert '<script src="../assets/widgets/common.js" defer>' in page
    assert widgets.wanted(
        ["# text\n#\n# <!-- widget: merges -->\n", "<!-- widget: pixels -->"]
    ) == {
        "merges",
        "pixels",
    }


# ---- a small site ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory, packages):
    """A repository of two chapters, with the real settings."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("nbclient")
    folder = tmp_path_factory.mktemp("book")
    (folder / "chapters").mkdir()
    (folder / "chapters/01_alpha.py").write_text(ALPHA, encoding="utf-8")
    (folder / "chapters/02_beta.py").write_text(BETA, encoding="utf-8")
    (folder / "chapters/index.md").write_text("# Home\n\n[Alpha](01_alpha.py)\n")
    shutil.copytree(ROOT / "chapters/assets", folder / "chapters/assets")
    main(["--root", str(folder), "export"])
    for path in (ROOT / "checkpoints", *(ROOT / "tinychat").iterdir()):
        (folder / path.relative_to(ROOT)).symlink_to(path)
    (folder / ".cache/site").mkdir(parents=True)
    (folder / ".cache/site" / packages.name).symlink_to(packages)
    shutil.copy(ROOT / "mkdocs.yml", folder)
    return folder


def build(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments],
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=900,
    )


@pytest.fixture(scope="module")
def first_build(book):
    return build(book)


def test_a_small_book_becomes_a_site(book, first_build):
    answer = first_build
    assert answer.returncode == 0, answer.stdout
    assert "WARNING" not in answer.stdout and "ran chapters/01_alpha.py" in answer.stdout
    page = (book / "site/01_alpha.html").read_text(encoding="utf-8")
    assert "counted [0, 1, 2]" in page and "nobody should read this" not in re.sub(
        r"<code>.*?</code>", "", page, flags=re.S
    )
    assert '<details class="solution">' in page and '<details class="test">' in page
    assert 'class="katex-display"' in page and 'data-widget="pixels"' in page
    assert 'href="api/alpha.html#L-' in page and 'href="notebooks/01_alpha.ipynb"' in page
    assert (book / "site/notebooks/01_alpha.ipynb").exists()
    other = (book / "site/02_beta.html").read_text(encoding="utf-8")
    assert 'alt="A line that rises from zero to two."' in other
    drawing = (book / "site/pictures/02_beta-1.svg").read_text(encoding="utf-8")
    assert "<svg" in drawing and "fill: #ffffff" not in drawing  # nothing behind it
    assert "numbers below LIMIT" in (book / "site/api/alpha.html").read_text(encoding="utf-8")
    assert not list((book / "site").rglob("*.py"))
    fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page + other)
    assert fetched == []


def test_a_second_build_runs_nothing_and_a_dead_link_stops_it(book, first_build):
    index = book / "chapters/index.md"
    text = index.read_text()
    index.write_text(text + "\n[gone](01_alpha.py#nowhere)\n")
    try:
        answer = build(book)
    finally:
        index.write_text(text)
    assert answer.returncode != 0 and "#nowhere" in answer.stdout
    assert "ran chapters" not in answer.stdout


def test_an_unknown_widget_stops_the_build():
    exceptions = pytest.importorskip("mkdocs.exceptions")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(exceptions.PluginError, match=r"index\.md: no widget 'nothing'"):
        site.on_page_markdown("<!-- widget: nothing -->", page, None, None)
