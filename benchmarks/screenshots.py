"""Look at a report and at `crossfl status` as people see them, with a headless Chromium.

    python benchmarks/screenshots.py results/report.html --journal .crossfl/numbers --outdir shots

Takes the page at 390 and at 1280 px, light and dark, and on paper, and a terminal of 80 × 24 with
what `crossfl status` says. Fails where the page writes to the console, asks for anything outside,
is wider than its window, or has text whose contrast is below that of WCAG 2.1 AA (4.5, 3 for large
text). The page itself has no script; a copy gets one that measures.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
WIDTHS = (390, 1280)
SCHEMES = {"light": "1", "dark": "0"}
"""Chromium's numbers for the preferred colour scheme."""
SECONDS = 120
MEASURE = """
<script>
const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
const lum = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92
  : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e)
  .backgroundColor); if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
const poor = new Map(); let seen = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
  if (!text || ['SCRIPT', 'STYLE'].includes(e.tagName) || !e.getClientRects().length) continue;
  const kind = e.getAttribute('class') || '';
  if (e.getAttribute('aria-hidden') === 'true' || /\\b(m|end)\\b/.test(kind))
    continue;  // marks, whose names stand beside them
  const s = getComputedStyle(e), svg = e instanceof SVGElement;
  const front = rgb(svg ? s.fill : s.color), back = behind(e), size = parseFloat(s.fontSize);
  const [a, b] = [lum(front), lum(back)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  seen += 1;
  if (ratio < (size >= 24 || (size >= 18.66 && s.fontWeight >= 700) ? 3 : 4.5))
    poor.set(text.slice(0, 40), ratio.toFixed(2));
}
const wide = document.documentElement.scrollWidth - window.innerWidth;
const cut = [...document.querySelectorAll('figure svg')].filter(s =>
  s.getBoundingClientRect().right > window.innerWidth + 1).length;
document.body.innerHTML = '<pre id="found">' + btoa(unescape(encodeURIComponent(JSON.stringify(
  {seen, poor: [...poor], wide, cut})))) + '</pre>';
</script>
"""


class Browser:
    """A headless Chromium without a network."""

    def __init__(self, program: str, scratch: Path) -> None:
        self._program, self._scratch = program, scratch

    def run(self, page: Path, *flags: str) -> str:
        """Open a page; what is printed.

        Raises:
            SystemExit: the page wrote to the console, or asked for something outside.
        """
        log = self._scratch / "net.json"
        words = [self._program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        words += ["--enable-logging=stderr", f"--log-net-log={log}", "--disable-sync"]
        words += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        words += [f"--user-data-dir={self._scratch / 'profile'}", *flags, page.resolve().as_uri()]
        done = subprocess.run(words, capture_output=True, timeout=SECONDS, check=False)
        errors = done.stderr.decode(errors="replace")
        if done.returncode != 0:
            sys.exit(f"{self._program} ended with {done.returncode}: {errors[-500:]}")
        if said := re.findall(r".*CONSOLE.*", errors):
            sys.exit(f"{page} wrote to the console: {said[0]}")
        asked = re.findall(r'"url":"([^"]*)"', log.read_text("utf-8", "replace"))
        outside = [
            url for url in asked if not url.startswith(("file:", "data:", "chrome", "about:"))
        ]
        if named := [url for url in outside if page.name in url or "google" not in url]:
            sys.exit(f"{page} asked for {named[0]}")
        return done.stdout.decode(errors="replace")


def scheme(name: str) -> str:
    """The flag that asks for light or for dark."""
    return f"--blink-settings=preferredColorScheme={SCHEMES[name]}"


def inspect(browser: Browser, page: Path, scratch: Path, width: int, colours: str) -> str:
    """Measure a page at a width: a line for people.

    A window is never narrower than 500 px; the page is put into a frame of the width instead.

    Raises:
        SystemExit: contrast is too low, or the page is wider than the window.
    """
    copy = scratch / "measured.html"
    text = page.read_text("utf-8").replace("</body>", MEASURE + "</body>")
    text = re.sub(r'<meta http-equiv="refresh"[^>]*>', "", text)
    copy.write_text(text, "utf-8")
    frame = scratch / "frame.html"
    frame.write_text(
        f'<iframe src="measured.html" style="border:0;width:{width}px;height:900px"></iframe>'
        "<script>addEventListener('load', () => document.title = 'ready')</script>",
        "utf-8",
    )
    flags = ["--allow-file-access-from-files", "--virtual-time-budget=4000", "--dump-dom"]
    target = copy
    if width < 500:
        frame.write_text(
            frame.read_text().replace(
                "document.title = 'ready'",
                "document.body.innerHTML = "
                "document.querySelector('iframe').contentDocument.body.innerHTML",
            ),
            "utf-8",
        )
        target = frame
    else:
        flags.append(f"--window-size={width},900")
    dom = browser.run(target, *flags, scheme(colours))
    match = re.search(r'<pre id="found">([A-Za-z0-9+/=]+)</pre>', dom)
    if match is None:
        sys.exit(f"{page} could not be measured at {width} px")
    import base64

    found = json.loads(base64.b64decode(match[1]))
    where = f"{page.name} at {width} px, {colours}"
    if found["poor"]:
        sys.exit(f"{where}: contrast of {found['poor'][:5]} is below AA")
    if found["wide"] > 0 or found["cut"]:
        sys.exit(f"{where}: {found['wide']} px too wide, {found['cut']} plots cut")
    return f"{where}: {found['seen']} texts, contrast AA; nothing is cut"


def shoot(browser: Browser, page: Path, target: Path, width: int, colours: str) -> None:
    """A picture of a page at a width."""
    source = page
    if width < 500:
        source = target.with_suffix(".frame.html")
        source.write_text(
            '<body style="margin:0"><iframe style="border:0;width:'
            f'{width}px;height:7000px" src="{page.resolve().as_uri()}"></iframe>',
            "utf-8",
        )
    flags = [f"--window-size={max(width, 500)},7000", f"--screenshot={target.resolve()}"]
    browser.run(source, "--allow-file-access-from-files", *flags, scheme(colours))
    if source is not page:
        source.unlink()


def terminal(journal: Path, target: Path, browser: Browser, scratch: Path) -> str:
    """A picture of a terminal of 80 × 24 with the status of a run; the text."""
    done = subprocess.run(
        [sys.executable, "-m", "crossfl", "status", str(journal)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "80", "LINES": "24"},
    )
    lines = done.stdout.splitlines()
    if len(lines) > 24 or any(len(line) > 80 for line in lines):
        sys.exit("crossfl status does not fit into 80 × 24")
    page = scratch / "status.html"
    page.write_text(
        '<meta charset="utf-8"><body style="margin:0;background:#14171a"><pre style="margin:12px;'
        "font:16px/20px 'DejaVu Sans Mono',monospace;color:#e4e7ea;width:80ch;height:480px\">"
        f"{html.escape(done.stdout)}</pre>",
        "utf-8",
    )
    browser.run(page, "--window-size=810,510", f"--screenshot={target.resolve()}")
    return done.stdout


def main() -> None:
    """Take and check all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", help="a report")
    parser.add_argument("--journal", type=Path, help="journal of a run, for its status")
    parser.add_argument("--outdir", type=Path, default=Path("screenshots"))
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    args.outdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        browser = Browser(program, scratch)
        if args.page:
            for width in WIDTHS:
                for colours in SCHEMES:
                    print(inspect(browser, args.page, scratch, width, colours), flush=True)
                    target = args.outdir / f"report-{width}-{colours}.png"
                    shoot(browser, args.page, target, width, colours)
            paper = (args.outdir / "report.pdf").resolve()
            browser.run(args.page, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
            print(f"{paper.name}: {paper.stat().st_size:,} bytes")
        if args.journal:
            print(terminal(args.journal, args.outdir / "status.png", browser, scratch))


if __name__ == "__main__":
    main()
