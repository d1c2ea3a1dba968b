"""Screenshots of TensorBoard for the docs: the dashboards of a run folder in a headless Chromium.

    python docs/screenshots.py runs/demo --out docs/images
    python docs/screenshots.py runs/cartpole-s0 runs/cartpole-s1 --pages scalars hparams

Needs Debian's packages chromium and chromium-driver. The browser is driven over WebDriver, JSON over HTTP, with the standard
library. Both servers and the browser use 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

PACKAGES = "apt-get install chromium chromium-driver"
MAX_BYTES = 250_000

FLAGS = (
    "--headless=new --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic",
    "--disable-dev-shm-usage --hide-scrollbars --force-prefers-reduced-motion --lang=en-US --no-proxy-server",
    "--use-angle=swiftshader --enable-unsafe-swiftshader",  # WebGL without a GPU, for the projector
    "--blink-settings=imageAnimationPolicy=1",  # GIFs play once and stop at their last frame, so that pictures are reproducible
)

SETTINGS = {
    **{"autoReload": False, "notificationLastReadTimeInMs": 9e12},
    **{"scalarSmoothing": 0, "ignoreOutliers": False, "stepSelectorEnabled": False},
    **{"timeSeriesSettingsPaneOpened": False, "sideBarWidthInPercent": 14},
}
"""TensorBoard's settings, as its frontend keeps them in the browser's local storage."""

FIND = """
const all = (selector, root = document) => [...root.querySelectorAll('*')].flatMap(e => [
  ...(e.matches(selector) ? [e] : []),
  ...(e.shadowRoot ? all(selector, e.shadowRoot) : []),
  ...(e.tagName === 'IFRAME' && e.contentDocument ? all(selector, e.contentDocument) : []),
]);
const shown = selector => all(selector).filter(e => e.checkVisibility());
const topOf = e => e.getBoundingClientRect().top;
"""
"""Functions for the scripts below: selectors that search shadow roots and frames too, which hold most of TensorBoard."""


@dataclass(frozen=True)
class Page:
    """A dashboard and its screenshot. `ready`, `act` and `end` are JavaScript.

    plugin  TensorBoard's name of the plugin whose data the dashboard shows
    path    appended to TensorBoard's address
    ready   true once all is loaded; also after `act`
    end     the element that the picture ends with; without one it is HEIGHTS[0] high
    act     run before the picture is taken, with the options as `arguments[0]`
    """

    plugin: str
    path: str
    ready: str
    end: str = "null"
    act: str = ""
    width: int = 1400


PAGES = {
    "scalars": Page(
        "timeseries",
        f"?smoothing=0&tagFilter={quote('eval|dream/(gap|real_return|imagined_return)|world/(open_loop/(1|5|15)$|persistence/15$|rate)')}#timeseries",
        "shown('scalar-card line-chart').length && !shown('mat-spinner').length",
        end="shown('metrics-card-grid')[0]",
    ),
    "images": Page(
        "images",
        f"#images&tagFilter={quote('dream|latent|world')}",
        "shown('img').length && shown('img').every(e => e.complete && e.naturalWidth)",
        end="shown('tf-category-paginated-view')[0]",  # the tags that match; the groups follow, with the same cards once more
        act="shown('tf-image-loader').forEach(e => e.style.paddingTop = '5px')",  # or the card cuts off its own run's name
        width=1520,  # three columns
    ),
    "text": Page(
        "text",
        "#text",
        "shown('tf-text-loader').length",
        end="shown('tf-category-paginated-view')[0]",
    ),
    "hparams": Page(
        "hparams",
        "#hparams",
        "shown('paper-checkbox.table-cell').length",
        end="shown('tf-hparams-session-group-details')[0]",
        # "Show Metrics" of the last row. The table reuses its cells: their order in the document says nothing.
        act="shown('paper-checkbox.table-cell').sort((a, b) => topOf(a) - topOf(b)).at(-1).click()",
        width=1520,
    ),
    "projector": Page(
        "projector",
        "#projector",
        "shown('vz-projector').some(e => e.projection) && !shown('paper-dialog').length",
        act="""
            const projector = shown('vz-projector')[0], data = projector.dataPanel;
            const names = data.colorOptions.filter(e => !e.isSeparator).map(e => e.name);
            const colour = arguments[0].colour;
            if (colour && !names.includes(colour)) throw `no colours for '${colour}'; there are: ${names.slice(1).join(', ')}`;
            if (colour) data.selectedColorOptionName = colour;
            // Placing the camera ends its orbit, which would give a different picture each time.
            projector.projectorScatterPlotAdapter.scatterPlot.setCameraPositionAndTarget([0.45, 0.9, 1.6], [0, 0, 0]);
        """,
    ),
}

HEIGHTS = (900, 600, 1200)
"""Of a page without `end`; minimum and maximum of one with it."""


def request(url: str, body: dict | None = None, method: str | None = None) -> Any:
    """The JSON answer of a server on this machine, without any proxy of the environment."""
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method), timeout=60) as answer:
        return json.load(answer)


@contextlib.contextmanager
def server(command: list[str], ready: str, log: Path, **options: Any) -> Iterator[str]:
    """A program that runs until the block ends, once its log matches the pattern `ready`; gives the match's group."""
    with log.open("w") as file:
        # In a session of its own: Ctrl-C reaches this script alone, which then ends the servers.
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        deadline = time.monotonic() + 60
        while not (match := re.search(ready, log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                output = log.read_text(errors="replace").strip()
                raise SystemExit(f"`{' '.join(command)}` was to start and print '{ready}'. It printed:\n{output}")
            time.sleep(0.1)
        yield match[1]
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):  # the second for those of its group that ignore the first
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, ending)
                process.wait(timeout=10)


def tensorboard(runs: list[Path], folder: Path) -> contextlib.AbstractContextManager[str]:
    """TensorBoard with all of the runs loaded; gives its address."""
    logdir = folder / "runs"
    logdir.mkdir()
    for run in runs:
        (logdir / run.name).symlink_to(run)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir=runs", "--host=127.0.0.1", "--port=0", "--load_fast=false"]
    command += ["--reload_interval=0", "--reload_task=blocking"]  # all is loaded before the first page is requested
    # Run in the folder: pages show the path as given, so that it is `runs` in every picture.
    return server(command, r"(http://127\.0\.0\.1:\d+/) ", folder / "tensorboard.log", cwd=folder)


class Browser:
    """A session of WebDriver (W3C); `url` is the session's."""

    def __init__(self, url: str):
        self.url = url

    def call(self, path: str, body: dict | None = None, method: str | None = None) -> Any:
        try:
            return request(self.url + path, body, method)["value"]
        except urllib.error.HTTPError as error:
            message = json.loads(error.read())["value"]["message"].strip().splitlines()[0]
            raise SystemExit(f"chromium refused '{path or 'a session'}': {message}") from None
        except OSError as error:
            raise SystemExit(f"chromedriver did not answer to '{path or 'a session'}': {error}") from None

    def open(self, url: str) -> None:
        self.call("/url", {"url": "about:blank"})  # a new fragment alone would load nothing
        self.call("/url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        return self.call("/execute/sync", {"script": FIND + script, "args": list(args)})

    def resize(self, width: int, height: int) -> None:
        """Sets the page's size in pixels, without the frame of a window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def wait(self, ready: str, page: str) -> None:
        deadline = time.monotonic() + 30
        while not self.run(f"return {ready}"):
            if time.monotonic() > deadline:
                raise SystemExit(f"page '{page}' was not ready after 30 seconds. It waited for: {ready}")
            time.sleep(0.2)

    def settled(self) -> bytes:
        """A picture that is the same a second later, so that loading and animations have ended. After 30 seconds, any."""
        deadline, last = time.monotonic() + 30, b""
        while (png := self.call("/screenshot")) != last and time.monotonic() < deadline:
            last = png
            time.sleep(1)
        return base64.b64decode(png)


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A headless Chromium that can connect to this machine only."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        missing = " and ".join(name for name, found in (("chromium", binary), ("chromedriver", driver)) if not found)
        raise SystemExit(f"{missing} not found on PATH. On Debian: {PACKAGES}")
    args = [*" ".join(FLAGS).split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    args += [f"--user-data-dir={folder / 'profile'}"]
    args += ["--no-sandbox"] if os.geteuid() == 0 else []  # as root it does not start with a sandbox
    wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": binary, "args": args}}
    env = {**os.environ, "TZ": "UTC", "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    with server([driver, "--port=0"], r"started successfully on port (\d+)", folder / "chromedriver.log", env=env) as port:
        root = Browser(f"http://127.0.0.1:{port}/session")
        browser = Browser(f"{root.url}/{root.call('', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}")
        try:
            yield browser
        finally:
            with contextlib.suppress(SystemExit):  # an earlier error is the message
                browser.call("", method="DELETE")


def active(url: str, pages: list[str]) -> set[str]:
    """Those of the pages that TensorBoard has data for."""
    deadline = time.monotonic() + 5
    while True:  # it looks for the projector's files only after the first request
        plugins = request(url + "data/plugins_listing")
        found = {page for page in pages if plugins.get(PAGES[page].plugin, {}).get("enabled")}
        if found == set(pages) or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


def take(browser: Browser, url: str, name: str, options: dict[str, Any]) -> bytes:
    """The picture of a page, as PNG."""
    page, (height, min_height, max_height) = PAGES[name], HEIGHTS
    browser.resize(page.width, height)
    browser.open(url + page.path)
    browser.wait(page.ready, name)
    if page.act:
        browser.run(page.act, options)
        browser.wait(page.ready, name)
    png = browser.settled()
    end = browser.run(f"const end = {page.end}; return end && Math.floor(end.getBoundingClientRect().bottom)")
    if end is None:
        return png
    browser.resize(page.width, min(max(end, min_height), max_height))
    return browser.settled()


def save(png: bytes, file: Path) -> int:
    """Writes a PNG with as many colours as fit into MAX_BYTES; gives its size."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (None, 256, 128, 64, 32):
        packed = io.BytesIO()
        (image.quantize(colours, dither=Image.Dither.NONE) if colours else image).save(packed, "PNG", optimize=True)
        if packed.tell() <= MAX_BYTES:
            break
    file.write_bytes(packed.getvalue())
    return packed.tell()


def runs_of(parser: argparse.ArgumentParser, given: list[Path]) -> list[Path]:
    """The run folders as absolute paths; exits with a message where one is none."""
    runs = [run.resolve() for run in given]
    for run in runs:
        if not any(run.rglob("*tfevents*")):
            parser.error(f"'{run}' holds no TensorBoard event files: expected the folder of a run, as `worldmodel train` leaves it")
        if sum(run.name == other.name for other in runs) > 1:
            parser.error(f"two folders are called '{run.name}', and TensorBoard shows no more than the name: rename one")
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description="Pictures of TensorBoard's dashboards.")
    parser.add_argument("run", type=Path, nargs="+", help="run folders, shown together")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="where <page>.png go (default: %(default)s)")
    parser.add_argument("--pages", nargs="+", choices=PAGES, help="default: all that the runs have data for")
    parser.add_argument("--colour", metavar="COLUMN", help="what colours the projector's points: a column of its metadata")
    args = parser.parse_args()
    runs, pages = runs_of(parser, args.run), args.pages or list(PAGES)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # an exception, which ends the servers
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="screenshots-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with tensorboard(runs, folder) as url, chromium(folder) as browser:
            found = active(url, pages)
            browser.open(url + "data/environment")  # any small page of this address, which local storage belongs to
            browser.run("localStorage.setItem('_tb_global_settings', arguments[0])", json.dumps(SETTINGS))
            for page in pages:
                if page in found:
                    file = args.out / f"{page}.png"
                    print(f"{file}  {save(take(browser, url, page, {'colour': args.colour}), file) / 1000:.0f} kB", flush=True)
                else:
                    print(f"{page}: nothing in these runs for TensorBoard's dashboard '{PAGES[page].plugin}'", file=sys.stderr)
    return 0 if found and (found == set(pages) or not args.pages) else 1


if __name__ == "__main__":
    sys.exit(main())
