"""The documentation as a site: built strictly, and looked at in a browser."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import browser
import pytest

pytestmark = pytest.mark.site
pytest.importorskip("mkdocs", reason='pip install "fusedkd[docs]"')

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
SHOTS = ROOT / "build" / "screenshots"
PAGES = ["index.html", *(f"{p.stem}.html" for p in (ROOT / "docs").glob("*.md")), "notebook.html"]
PAGES += [f"api/{p.stem}.html" for p in (ROOT / "docs/api").glob("*.md")]
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of the site, built anew."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if not browser.PATH:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is installed: apt-get install chromium")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with browser.page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def test_every_page_is_built(address: str) -> None:
    assert not [page for page in PAGES if not (SITE / page).is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, address: str, tab: browser.Page) -> None:
    for kind, (width, height) in WIDTHS.items():
        tab.open(f"{address}/{page}", width, height)
        assert not tab.troubles(), page
        assert all(url.startswith((address, "data:")) for url in tab.asked_for()), "from elsewhere"
        assert tab.evaluate("document.querySelector('article h1').innerText.length") > 3
        assert tab.evaluate("document.querySelector('article').innerText.length") > 200
        assert tab.evaluate("document.querySelectorAll('nav .md-nav__link').length") > len(PAGES)
        broken = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
        assert tab.evaluate(broken) == []
        wide = tab.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{page} is {wide} pixels wide on a screen of {width}"
        shot = tab.screenshot(SHOTS / f"{page.removesuffix('.html').replace('/', '-')}-{kind}.png")
        assert len(shot) > 10_000  # an empty page has 5,000


def test_the_search_finds(address: str, tab: browser.Page) -> None:
    tab.open(f"{address}/index.html", *WIDTHS["desk"])
    tab.evaluate(
        "document.querySelector('.md-search__input').focus();"
        "document.querySelector('.md-search__input').value = 'temperature';"
        "document.querySelector('.md-search__input').dispatchEvent(new Event('input'));"
        "document.querySelector('.md-search__input').dispatchEvent(new Event('keyup'));"
    )
    found = """new Promise(done => { const wait = () => {
        const n = document.querySelectorAll('.md-search-result__item').length;
        n ? done(n) : setTimeout(wait, 50); }; wait(); setTimeout(() => done(0), 10000); })"""
    assert tab.evaluate(found) > 3
