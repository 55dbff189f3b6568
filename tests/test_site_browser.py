"""The whole site in a real browser: nothing fetched from elsewhere, search, dark mode, widgets.

Slow: it builds every chapter (from the cache in .cache/site where it can). Debian: apt-get install
chromium. `-s` prints the figures that CONTRIBUTING.md asks to be written down.
"""

import functools
import gzip
import http.server
import io
import json
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
API = [f"api/{stem[3:]}" for stem in CHAPTERS if (ROOT / "tinychat" / f"{stem[3:]}.py").exists()]
WRITTEN = [path.stem for path in sorted((ROOT / "chapters").glob("*.md"))]
PAGES = ["404", *WRITTEN, "report_card", "model_card", *CHAPTERS, "api/index", *API]
WIDGETS = ("merges", "sampling", "attention", "pixels", "ppo")


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


def test_these_are_all_pages(site):
    assert {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")} == set(
        PAGES
    )


@pytest.mark.parametrize("stem", PAGES[1:])
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


@pytest.fixture
def ppo(open_page):
    """The PPO playground, as a reader finds it, with the curves that it draws."""
    from tinychat.book import curves

    page = open_page("playground.html")
    box = page.locator('[data-widget="ppo"]')
    box.scroll_into_view_if_needed()
    return box, curves.load(ROOT / curves.FOLDER)


def test_the_ppo_widget_follows_its_sliders(ppo):
    from tinychat.book import curves

    box, runs = ppo

    def told(run, row: int, beta: float) -> str:
        mark, kl = (curves.smooth(curves.column(run, name))[row] for name in ("score", "kl"))
        sum_ = f"{mark:.2f} − {beta:.2f} × {kl:.2f} = {mark - beta * kl:.2f}"
        return sum_.replace("-", "−")

    for number, run in enumerate(runs):
        box.get_by_label("The run").select_option(str(number))
        steps = len(run["rows"])
        assert box.get_by_role("slider", name="Step").input_value() == str(steps), (
            "it begins at the end"
        )
        for beta in (0.0, 0.05, 0.12, 0.5):
            box.get_by_label("β, the price").fill(str(beta))
            stop = curves.best(run, beta)
            said = box.locator(".said").inner_text()
            assert f"you would stop at step {stop + 1}: {told(run, stop, beta)}." in said
        for step in (1, 17, steps):
            box.get_by_role("slider", name="Step").fill(str(step))
            said = box.locator(".said").inner_text()
            assert said.startswith(
                f"Around step {step}, mark − β × KL = {told(run, step - 1, 0.5)}."
            )
            labels, values = (box.locator(f".tile {x}").all_inner_texts() for x in ("small", "b"))
            tiles = dict(zip(labels, values, strict=True))
            at = dict(zip(run["columns"], run["rows"][step - 1], strict=True))
            assert tiles["mark"].replace("−", "-") == f"{at['score']:.2f}"
            assert tiles["KL, nats a reply"].replace("−", "-") == f"{at['kl']:.2f}"
            # To a browser 26.5 is 27, to Python 26.
            assert tiles["tokens a reply"] == str(int(at["length"] + 0.5))
            assert tiles["repeated"] == f"{100 * at['repetition']:.1f} %"
            assert tiles["distinct-2 of the step"] == f"{at['distinct_2']:.2f}"
            assert tiles["clipped"] == f"{100 * at['clip_fraction']:.2f} %"
            assert len(tiles) == len(run["columns"]) - 1
        box.get_by_role("button", name="Go to step").click()
        assert box.get_by_role("slider", name="Step").input_value() == str(
            curves.best(run, 0.5) + 1
        )


def test_the_key_names_the_judge_only_where_one_looked_on(ppo):
    box, runs = ppo
    judged = ["judge" in run["columns"] for run in runs]
    assert True in judged and False in judged
    for run, one in zip(runs, judged, strict=True):
        box.get_by_label("The run").select_option(run["title"])
        assert box.get_by_text("another judge", exact=True).is_visible() == one


def test_the_ppo_chart_lies_where_the_numbers_say(ppo):
    from tinychat.book import curves

    box, (run, *_) = ppo
    dots = box.locator(".dots circle")
    marks = curves.column(run, "score")
    assert dots.count() == len(marks)
    heights = [float(y) for y in dots.evaluate_all("all => all.map(c => c.getAttribute('cy'))")]
    # Screens count from the top: the height falls in a straight line as the mark rises.
    (a, b), (x, y) = (marks[0], marks[-1]), (heights[0], heights[-1])
    slope = (y - x) / (b - a)
    assert slope < 0
    assert heights == pytest.approx([x + slope * (mark - a) for mark in marks], abs=0.1)
    # The dashed line touches the path: no point of the path is worth more.
    box.get_by_label("β, the price").fill("0.15")
    inside = """box => {
        const ends = box.querySelector(".same").getAttribute("d");
        const [x1, y1, x2, y2] = ends.match(/[\\d.]+/g).map(Number);
        const path = box.querySelector(".proxy").getAttribute("d").match(/[\\d.]+ [\\d.]+/g);
        return path.map(p => p.split(" ").map(Number))
            .map(([x, y]) => y - (y1 + ((y2 - y1) * (x - x1)) / (x2 - x1)));
    }"""
    below = box.evaluate(inside)
    assert min(below) == pytest.approx(0, abs=0.3)
    assert below.index(min(below)) == curves.best(run, 0.15)
    # Whoever points at the chart chooses the nearest step.
    place = dots.nth(0).bounding_box()
    box.locator(".chart svg").scroll_into_view_if_needed()
    place = dots.nth(0).bounding_box()
    box.page.mouse.click(place["x"], place["y"])
    assert int(box.get_by_role("slider", name="Step").input_value()) <= 8


def test_the_ppo_chart_draws_a_judge_where_a_run_has_one(chromium, address, site):
    """The judge's mark rises, then falls, while the proxy climbs on: the page says where."""
    text = (site / "assets/widgets/data-runs.js").read_text(encoding="utf-8")
    begin = "tinychat.data.runs = "
    data = json.loads(text.removeprefix(begin).rstrip().removesuffix(";"))
    run = data["runs"][0]
    run["columns"].append("judge")
    for number, row in enumerate(run["rows"]):
        row.append(round(1 - abs(number - 20) / 20, 3) if number % 4 == 0 else None)
    page = chromium.new_page()
    changed = f"{begin}{json.dumps(data)};"
    page.route("**/data-runs.js", lambda route: route.fulfill(body=changed))
    page.goto(f"{address}/playground.html")
    box = page.locator('[data-widget="ppo"]')
    judged = len(range(0, len(run["rows"]), 4))
    assert box.locator("circle.judge").count() == judged
    assert "The other judge liked step 21 most: 1.00." in box.locator(".said").inner_text()
    assert box.locator(".key .judge").count() == 1
    box.get_by_label("The run").select_option("1")
    assert box.locator("circle.judge").count() == 0
    page.close()


@pytest.mark.parametrize("name", WIDGETS)
def test_the_keyboard_reaches_every_control(open_page, name):
    page = open_page("playground.html")
    wanted = page.locator(f'[data-widget="{name}"]').evaluate(
        """box => {
            const all = [...box.querySelectorAll("button, select, textarea, input, [tabindex]")];
            const open = all.filter((one) => !one.disabled);
            open.forEach((one, i) => (one.dataset.control = i));
            open[0].focus();
            return open.length;
        }"""
    )
    reached = []
    for _ in range(wanted):
        at, ring = page.evaluate(
            "[document.activeElement.dataset.control,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert ring != "none", f"nobody sees that control {at} has the focus"
        reached.append(at)
        page.keyboard.press("Tab")
    assert reached == [str(i) for i in range(wanted)]
    left = "document.activeElement.closest('[data-widget]')?.dataset.widget"
    assert page.evaluate(left) != name, "no trap"


def test_sliders_move_by_the_arrow_keys(open_page):
    page = open_page("playground.html")
    for name, label in (("sampling", "Temperature"), ("ppo", "Step"), ("ppo", "β, the price")):
        box = page.locator(f'[data-widget="{name}"]')
        before = box.locator(".said").inner_text()
        box.get_by_role("slider", name=label).focus()
        page.keyboard.press("Home")
        low = box.get_by_role("slider", name=label).input_value()
        for _ in range(7):
            page.keyboard.press("ArrowRight")
        assert float(box.get_by_role("slider", name=label).input_value()) > float(low)
        assert box.locator(".said").inner_text() != before


@pytest.mark.parametrize("stem", CHAPTERS)
def test_the_notebook_button_gives_a_notebook(open_page, stem, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    page = open_page(f"{stem}.html")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Notebook", exact=True).click()
    assert waiting.value.suggested_filename == f"{stem}.ipynb"
    waiting.value.save_as(tmp_path / "book.ipynb")
    book = nbformat.read(tmp_path / "book.ipynb", as_version=4)
    nbformat.validate(book)
    title = page.locator("h1").first.inner_text().removesuffix("¶").strip()
    assert book.cells[0].source.startswith(f"# {title}\n")
    assert sum(cell.cell_type == "code" for cell in book.cells) >= 5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("stem", PAGES[1:])  # 404's links lead nowhere without an address
def test_axe_finds_nothing(open_page, stem, scheme):
    from tinychat.book import vendor

    home = vendor.install(ROOT / ".cache" / "site")
    page = open_page(f"{stem}.html", scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.wait_for_timeout(400)
    page.add_script_tag(content=(home / "node_modules/axe-core/axe.min.js").read_text())
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    told = []
    for violation in result["violations"]:
        first = violation["nodes"][0]
        told.append(f"{violation['id']}: {first['html'][:200]} {first['failureSummary'][:300]}")
    assert told == []
