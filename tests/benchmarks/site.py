"""How soon pages of the built site are there: what Lighthouse measures, in headless Chromium.

    python tests/benchmarks/site.py site [PAGE ...] [--runs 3]

Each page is loaded from a local server that compresses as GitHub Pages does, with an empty cache,
twice: as it is, and as on a phone (390 pixels wide, a processor four times slower, 1.6 Mbit/s with
150 ms of delay). Prints medians:

- fcp, lcp: milliseconds to the first and to the largest content drawn
- blocking: milliseconds beyond 50 of each long task until two seconds after loading
- shift: how far the layout jumps (cumulative layout shift)
- weight: kB as they travel, the pictures that nobody scrolled to included

Then the milliseconds from "causal mask" in the search to its first result. Last one JSON line.
"""

import argparse
import functools
import http.server
import json
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_site_browser import FLAGS, Packed  # noqa: E402

PAGES = ("index", "07_pretraining", "api/ppo", "playground")
PHONE = {
    "offline": False,
    "latency": 150,
    "downloadThroughput": 1.6e6 / 8,
    "uploadThroughput": 750e3 / 8,
}
WATCH = """
globalThis.seen = { lcp: 0, shift: 0, tasks: [] };
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) seen.lcp = one.startTime;
}).observe({ type: "largest-contentful-paint", buffered: true });
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) seen.shift += one.value;
}).observe({ type: "layout-shift", buffered: true });
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) seen.tasks.push([one.startTime, one.duration]);
}).observe({ type: "longtask", buffered: true });
"""
READ = """() => {
  const fcp = performance.getEntriesByName("first-contentful-paint")[0].startTime;
  const late = seen.tasks.filter(([start, time]) => start + time > fcp);
  const blocking = late.reduce((sum, [, time]) => sum + Math.max(0, time - 50), 0);
  return { fcp, lcp: seen.lcp, blocking, shift: seen.shift };
}"""


def load(browser: Browser, address: str, phone: bool) -> dict[str, float]:
    context = browser.new_context(viewport={"width": 390 if phone else 1280, "height": 844})
    page = context.new_page()
    page.add_init_script(WATCH)
    if phone:
        link = context.new_cdp_session(page)
        link.send("Emulation.setCPUThrottlingRate", {"rate": 4})
        link.send("Network.enable")
        link.send("Network.emulateNetworkConditions", PHONE)
    page.goto(address, wait_until="load", timeout=120_000)
    page.wait_for_timeout(2000)
    found: dict[str, float] = page.evaluate(READ)
    if not phone:
        found["weight"] = weight(page)
    context.close()
    return found


def weight(page: Page) -> float:
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")
    page.wait_for_load_state("networkidle")
    sizes = page.evaluate(
        "[...performance.getEntriesByType('resource'),"
        "...performance.getEntriesByType('navigation')].map(e => e.encodedBodySize)"
    )
    return sum(sizes) / 1000


def search(browser: Browser, address: str) -> float:
    page = browser.new_page()
    page.goto(address, wait_until="load")
    page.keyboard.press("/")
    page.wait_for_timeout(1500)  # a person would still be typing
    started = time.perf_counter()
    page.keyboard.type("causal mask")
    page.locator(".md-search-result__item a").first.wait_for(timeout=60_000)
    taken = 1000 * (time.perf_counter() - started)
    page.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="the folder that `mkdocs build` made")
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    handler = functools.partial(Packed, directory=str(options.site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    rows: dict[str, Any] = {}
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        for page in options.pages:
            for phone in (False, True):
                runs = [load(browser, f"{here}/{page}.html", phone) for _ in range(options.runs)]
                row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                rows[f"{page}, phone" if phone else page] = row
                told = "  ".join(f"{key} {value:.3g}" for key, value in row.items())
                print(f"{page:>15} {'phone' if phone else '':>5}  {told}", flush=True)
        times = [search(browser, f"{here}/index.html") for _ in range(options.runs)]
        rows["search"] = statistics.median(times)
        print(f"search, to its first result: {rows['search']:.0f} ms")
        browser.close()
    server.shutdown()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
