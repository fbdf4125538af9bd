"""The page at `/`: what it is served with, and what a person sees of it in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from jacray.http.server import PAGE

from tests.service.http.test_http_compute import NET
from tests.serving import ALICE, BOB, Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("path", "media"),
    [("/", "text/html"), ("/page/app.js", "javascript"), ("/page/tensors.js", "javascript"), ("/page/page.css", "css")],
)
def test_the_page_needs_no_token_to_be_seen(server: Server, path: str, media: str) -> None:
    status, headers, body = server.ask("GET", path, token="")
    assert status == 200
    assert media in headers["content-type"]
    assert body


def test_the_page_runs_only_its_own_code_and_names_no_other_host() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'" in policy[1]
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", html), "the policy forbids inline code"
    text = "".join(path.read_text(encoding="utf-8") for path in PAGE.iterdir())
    hosts = set(re.findall(r"(?:https?:)?//([\w.]+\.\w+)", text))
    assert hosts <= {"www.w3.org"}, "the name space of SVG is a name, not an address"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A tab of its own, which must not ask anyone but the service, and in which no script may fail."""
    context = browser.new_context(viewport={"width": 390, "height": 800})
    tab = context.new_page()
    faults: list[str] = []
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda sent: faults.extend([] if re.match("http://127|data:", sent.url) else [sent.url]))
    yield tab
    context.close()
    assert not faults


@pytest.fixture(scope="module")
def job(server: Server) -> str:
    with server.client() as client:
        done = client.submit(NET, X, weights=torch.ones(2), returns=["jacobian", "weighted_gradient"])
        done.result(timeout=100)
        return str(done.id)


def enter(page: Page, server: Server, token: str, path: str = "/") -> None:
    page.goto(server.url + path)
    page.get_by_label("This service asks for a token").fill(token)
    page.get_by_role("button", name="Sign in").click()


@pytest.mark.slow
def test_a_person_signs_in_finds_a_job_and_sees_its_numbers(server: Server, job: str, page: Page) -> None:
    enter(page, server, "not-a-token-of-this-service")
    page.get_by_text("That token is not known here").wait_for()
    enter(page, server, ALICE)
    page.get_by_role("link", name=job).click()
    page.get_by_text("independent checks passed").wait_for()
    page.get_by_role("img", name="2 by 3 numbers").wait_for()
    spectrum = page.get_by_role("img", name="singular values").get_attribute("aria-label")
    with server.client() as client:
        rows = torch.as_tensor(client.job(job).result().jacobian)
    assert spectrum is not None
    shown = [float(number.replace("\N{MINUS SIGN}", "-")) for number in spectrum.split() if number[0].isdigit()]
    known = torch.linalg.svdvals(rows[0].double())
    assert shown == pytest.approx([float(known[0]), float(known[-1])], rel=5e-3)
    page.get_by_role("spinbutton", name="Sample").fill("29")
    last = torch.linalg.svdvals(rows[29].double())
    page.get_by_text(re.compile(rf"Singular values .* from {float(last[0]):.2g}")).wait_for()
    page.get_by_role("combobox", name="Array").select_option("weighted_gradient")
    page.get_by_role("img", name="1 by 3 numbers").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "a narrow screen needs no sideways scroll"
    )


@pytest.mark.slow
def test_another_person_sees_none_of_it(server: Server, job: str, page: Page) -> None:
    enter(page, server, BOB, f"/#job/{job}")
    page.get_by_text("It was deleted, or it is not yours.").wait_for()
    assert page.get_by_text("independent checks").count() == 0


@pytest.mark.slow
def test_a_job_is_cancelled_from_the_page(server: Server, page: Page) -> None:
    wide = {"kind": "layers", "layers": [{"kind": "Linear", "in_features": 600, "out_features": 600}] * 3, "seed": 0}
    with server.client() as client:
        long = client.submit(wide, torch.ones(1000, 600), method="backward_loop", chunk_size=10)
        enter(page, server, ALICE, f"/#job/{long.id}")
        page.get_by_role("button", name="Cancel this job").click()
        page.get_by_role("heading", name="cancelled").wait_for()
        assert long.status().state == "cancelled"
