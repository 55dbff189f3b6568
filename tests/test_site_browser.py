"""The whole site in a real browser: nothing fetched from elsewhere, search, dark mode, widgets.

Slow: it builds every chapter (from the cache in .cache/site where it can). Debian: apt-get install
chromium. `-s` prints the figures that CONTRIBUTING.md asks to be written down.
"""

import functools
import gzip
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (390, 1280, 1920)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",  # or it asks Google's hosts at every start
    "--disable-component-update",
    "--disable-sync",
)
WEIGHT = 400_000  # bytes of one chapter as they travel, pictures and fonts included
CHAPTERS = [path.stem for path in sorted((ROOT / "chapters").glob("[0-9][0-9]_*.py"))]


@pytest.fixture(scope="module")
def site():
    """The built site: the folder that TINYCHAT_SITE_FOLDER names, or a fresh build."""
    if folder := os.environ.get("TINYCHAT_SITE_FOLDER"):
        return Path(folder)
    pytest.importorskip("mkdocs")
    folder = ROOT / ".cache" / "site" / "built"
    answer = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert answer.returncode == 0 and "WARNING" not in answer.stdout, answer.stdout
    return folder


class Packed(http.server.SimpleHTTPRequestHandler):
    """Serves files compressed where that is usual, as GitHub Pages does."""

    def log_message(self, *_):
        pass

    def send_head(self):
        path = Path(self.translate_path(self.path))
        if path.suffix not in (".html", ".css", ".js", ".json", ".svg") or not path.is_file():
            return super().send_head()
        data = gzip.compress(path.read_bytes(), 6)
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Packed, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, address):
    """Open a page of the site; at the end, complain about errors and about foreign requests."""
    contexts, complaints = [], []

    def go(path: str, width: int = 1280, scheme: str = "light", base: str = address):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda r: complaints.append(f"failed: {r.url}"))

        def asked(request):
            if not request.url.startswith((base, "data:", "blob:")):
                complaints.append(f"foreign: {request.url}")

        page.on("request", asked)
        page.goto(f"{base}/{path}", wait_until="load")
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("stem", ["index", "playground", "api/gpt", *CHAPTERS])
def test_every_page_is_light_and_fits_the_screen(open_page, stem):
    for width in WIDTHS:
        page = open_page(f"{stem}.html", width)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width == 1280:
            # A lazy picture is not fetched before it is near: the weight is that of all of them.
            page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            page.wait_for_load_state("networkidle")
            broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
            assert page.evaluate(broken) == 0
            entries = page.evaluate(
                "[...performance.getEntriesByType('resource'),"
                "...performance.getEntriesByType('navigation')].map(e => e.encodedBodySize)"
            )
            paint = page.evaluate(
                "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            )
            print(f"{stem}: {sum(entries) / 1000:.0f} kB, first paint {paint:.0f} ms")
            assert sum(entries) < WEIGHT


def test_formulas_are_drawn_in_their_font(open_page):
    page = open_page("01_neural_net.html")
    assert page.locator(".katex-display").count() >= 2
    assert page.locator(".arithmatex").count() == 0
    page.evaluate("document.fonts.ready")
    assert page.evaluate("document.fonts.check('1em KaTeX_Main')")
    assert page.locator("text=/\\$\\$/").count() == 0


def test_dark_mode_follows_the_system_and_the_switch(open_page):
    ink = "getComputedStyle(document.body).backgroundColor"
    page = open_page("05_attention.html", scheme="dark")
    dark = page.evaluate(ink)
    page.get_by_title("Switch to light mode").click()
    light = page.evaluate(ink)
    assert dark != light == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate(ink) == light  # the choice is remembered


@pytest.mark.parametrize("way", ["served", "from disk"])
def test_search_finds_the_causal_mask(open_page, site, way):
    base = {"base": site.as_uri()} if way == "from disk" else {}
    page = open_page("index.html", **base)
    page.keyboard.press("/")
    page.keyboard.type("causal mask")
    first = page.locator(".md-search-result__item a").first
    first.wait_for(timeout=20_000)
    found = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
    assert any("05_attention.html" in link for link in found)


def test_the_merges_widget_tells_the_tokens(open_page):
    from tinychat.data import tokenizer_model
    from tinychat.tokenizer import Tokenizer

    text = "a reader's own text 🦊"
    page = open_page("playground.html")
    box = page.locator('[data-widget="merges"]')
    box.locator("textarea").fill(text)
    shown = box.locator(".token small").all_inner_texts()
    assert [int(number) for number in shown] == Tokenizer(tokenizer_model()).encode(text)
    box.get_by_text("back").click()
    assert "Step" in box.locator(".said").inner_text()
    assert box.locator(".joined").count() == 2


def test_the_sampling_widget_follows_its_sliders(open_page):
    page = open_page("playground.html")
    box = page.locator('[data-widget="sampling"]')
    assert "8,192 of 8,192" in box.locator(".said").inner_text()
    box.get_by_label("Top-k").fill("3")
    assert box.locator(".said").inner_text().startswith("3 of 8,192")
    shares = box.locator(".share").all_inner_texts()
    assert sum(float(share.split()[0]) for share in shares[:3]) == pytest.approx(100, abs=0.2)
    assert shares[3] == "out"
    box.get_by_label("Temperature").fill("0")
    assert box.locator(".share").first.inner_text() == "100.0 %"
    words = box.locator(".word").all_inner_texts()
    box.get_by_text("Throw the dice").click()
    assert words[0].strip() in box.locator(".drawn").inner_text()


def test_the_attention_widget_follows_the_keyboard(open_page):
    page = open_page("playground.html")
    box = page.locator('[data-widget="attention"]')
    tokens = box.locator("button.token")
    tokens.nth(6).focus()
    shares = [text for text in box.locator(".token small").all_inner_texts() if text != "·"]
    assert len(shares) == 7  # nobody looks ahead
    assert sum(float(share.split()[0]) for share in shares) == pytest.approx(100, abs=4)
    before = box.locator(".said").inner_text()
    box.get_by_label("Layer").select_option("1")
    assert box.locator(".said").inner_text() != before


def test_the_pixels_widget_answers_clicks(open_page):
    page = open_page("playground.html")
    box = page.locator('[data-widget="pixels"]')
    for name in ("upright", "level", "cross", "ring"):
        for button in (name, f"{name}, inverted"):
            box.get_by_role("button", name=button, exact=True).click()
            assert box.locator(".said").inner_text().startswith(f"It says: {name},")
    before = box.locator(".share").all_inner_texts()
    box.get_by_label("row 2, column 2").focus()
    page.keyboard.press("Space")
    assert box.locator(".share").all_inner_texts() != before


def test_a_page_reads_without_scripts(chromium, address):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/playground.html")
    assert page.locator('[data-widget="merges"] td').first.is_visible()
    page.goto(f"{address}/01_neural_net.html")
    assert page.locator(".katex-display").first.is_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["index", "playground", "05_attention", "09_dialogue", "api/gpt"])
def test_axe_finds_nothing(open_page, path, scheme):
    from tinychat.book import vendor

    home = vendor.install(ROOT / ".cache" / "site")
    page = open_page(f"{path}.html", scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(400)
    page.add_script_tag(content=(home / "node_modules/axe-core/axe.min.js").read_text())
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    told = []
    for violation in result["violations"]:
        first = violation["nodes"][0]
        told.append(f"{violation['id']}: {first['html'][:200]} {first['failureSummary'][:300]}")
    assert told == []
