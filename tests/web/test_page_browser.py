"""The page in a real browser: Debian's Chromium, driven by Playwright. Skipped where there is none
(``make test-page`` installs it)."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llamaslot.observe.activity import Activity, Outcome, Stage
from llamaslot.observe.history import History
from tests.support.inprocess import letters, served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamaslot"
AXE = next(_CACHE.glob("axe-*/node_modules/axe-core/axe.min.js"), None)
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
ADMIN_KEY = "an-admin-key-of-forty-characters-0123456"
CONNECTION = "document.getElementById('connection').textContent"
SIZES = {"wide": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make test-page installs it"),
    pytest.mark.xdist_group("browser"),
]


@asynccontextmanager
async def browsing(url: str, path: str = "/llamaslot/") -> AsyncIterator[tuple[Any, list[str]]]:
    """A page that was opened, and what its console said that is no praise."""
    playwright = pytest.importorskip("playwright.async_api")
    said: list[str] = []
    async with playwright.async_playwright() as started:
        browser = await started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            # axe is put into the page by the test: the page's own policy would refuse it.
            context = await browser.new_context(viewport=SIZES["wide"], bypass_csp=True)
            page = await context.new_page()
            page.on("console", lambda message: said.append(message.text) if message.type != "log" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
            await page.goto(url + path)
            yield page, said
        finally:
            await browser.close()


async def live(page: Any) -> None:
    await page.wait_for_selector("#connection.live")


def history_of(meta_dir: Path, n: int, n_users: int = 20) -> History:
    """A file with ``n`` requests, as an earlier llamaslot left it."""
    history = History(meta_dir / "history.sqlite")
    for i in range(n):
        bad = i % 50 == 0
        history.add(
            Activity(
                id=f"req-{i}",
                at=time.time() - 30 * (n - i),
                user=HOSTILE if i % 7 == 0 else f"key:user{i % n_users}",
                model=HOSTILE if i % 7 == 0 else "model",
                client=HOSTILE,
                backend="gpu0",
                slot=i % 4,
                outcome=Outcome.UNSERVED if bad else Outcome.DONE,
                error="llama-server is away" if bad else "",
                n_prompt=20_000,
                n_reused=19_000,
                n_computed=1_000,
                n_answered=200,
                first_s=0.5 + i % 9,
                total_s=9.0,
                prefill_s=0.5,
                decode_s=8.0,
                saved_s=20.0,
                saved_error_s=2.0,
                text=f"slot {i % 4} held 19,000 of 20,000 tokens",
                stages=[Stage("queue", 0.0, 0.5), Stage("answer", 0.5, 8.5, HOSTILE)],
            )
        )
    return history


async def faults(page: Any) -> list[str]:
    """What axe finds that is serious."""
    if AXE is None:
        return []  # ``make test-page`` installs it
    await page.add_script_tag(path=str(AXE))
    found = await page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


async def test_twenty_users_and_two_thousand_requests(tmp_path: Path) -> None:
    """It stays usable, has no serious fault for axe, says nothing in the console, scrolls in one direction only, and
    takes no text for markup; light and dark, on a desk and on a phone."""
    async with served(tmp_path, wait=False, slots=4) as it:
        history = history_of(it.config.store.meta_dir, 2000)
        await history.load()
        await history.close()
        await it.fake.start()
        await it.start()
        for n in range(3):
            await it.ask(letters(n, 400))
        async with it.busy(2), browsing(it.url) as (page, said):
            await live(page)
            await page.wait_for_selector("#flights tr:nth-child(2)")
            await page.wait_for_function("document.querySelectorAll('#requests tr').length == 20")
            await page.locator("#requests button.time").first.click()
            await page.wait_for_selector("#requests .detail .timeline")
            for size, scheme in (("wide", "light"), ("phone", "dark")):
                await page.set_viewport_size(SIZES[size])
                await page.emulate_media(color_scheme=scheme)
                assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
                assert await faults(page) == []
            await page.fill("#filter", "user3 19,000")
            await page.wait_for_function(
                "document.getElementById('activity-sum').textContent.includes(' of the last')"
            )
            await page.fill("#filter", "")
            took_ms = await page.evaluate(
                "(() => { const began = performance.now(); document.getElementById('more').click();"
                " document.body.offsetHeight; return performance.now() - began; })()"
            )
            assert took_ms < 2000  # 220 rows are drawn in some 50 ms
            assert await page.locator("#requests tr:not(.detail)").count() == 220
            assert await page.title() == "llamaslot"
            assert await page.locator("img, #content script").count() == 0
            assert HOSTILE in await page.locator("#requests").inner_text()
            assert said == []
            # A connection that says nothing any more is made anew.
            async with page.expect_request("**/events"):
                await page.evaluate(
                    "(() => { const now = Date.now; let all = 0; window.real = now;"
                    " Date.now = () => now() + (all += 60_000); })()"
                )
            await page.evaluate("Date.now = window.real")
            await live(page)


async def test_an_operator_needs_the_key_and_a_keyboard(tmp_path: Path) -> None:
    """The key is asked for, sent as a header only, and forgotten with the tab. By keyboard a timeline is opened and
    closed, a snapshot deleted, a request cancelled. Rows are copied as a table, whatever is in the names. An outage is
    seen, and its end."""
    async with served(tmp_path, {"auth": {"admin_key": ADMIN_KEY}}, slots=1) as it:
        for n in range(3):
            await it.post("/completion", {"prompt": letters(n, 400), "n_predict": 1}, **{"User-Agent": "a|b"})
        async with it.busy() as (asked,), browsing(it.url) as (page, said):
            addresses: list[str] = []
            page.on("request", lambda request: addresses.append(request.url))
            await page.wait_for_selector("#login:not([hidden])")
            await page.keyboard.type("wrong")
            await page.keyboard.press("Enter")
            await page.wait_for_function(
                "document.getElementById('login-error').textContent == 'Invalid API Key'"
            )
            await page.keyboard.type(ADMIN_KEY)
            await page.keyboard.press("Enter")
            await live(page)
            assert await page.locator("#login").is_hidden()
            assert await page.evaluate("localStorage.length") == 0

            await page.wait_for_selector("#requests button.time")
            time_of = page.locator("#requests button.time").first
            await time_of.focus()
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#requests .detail")
            assert await time_of.get_attribute("aria-expanded") == "true"
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#requests .detail", state="detached")

            await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            await page.focus("#copy")
            await page.keyboard.press("Enter")
            await page.wait_for_function("document.getElementById('copy').textContent.startsWith('Copied')")
            lines = (await page.evaluate("navigator.clipboard.readText()")).splitlines()
            assert lines[0].startswith("| Ended | User | What happened")
            assert [line.replace("\\|", "").count("|") for line in lines] == [10] * 5
            # Of a request that mostly waited, the wait is said first.
            row = "{outcome: 'done', at: 0, total_s: 66, queued_s: 61, waited_s: 0.3, first_s: 64, text: 'restored',"
            row += " user: 'x', model: 'm', n_computed: 1, n_answered: 1}"
            table = await page.evaluate(f"import('./activity.js').then((it) => it.asMarkdown([{row}]))")
            assert "| waited 61 s for a slot; restored |" in table

            await page.wait_for_selector("#icicle button")
            for shade in ("rank", "hits", "age"):
                await page.select_option("#shade", shade)
                style = await page.locator("#icicle button.snapshot").first.get_attribute("style")
                assert re.search(r"--strength: \d+%", style), style
            await page.locator("#icicle button").first.focus()
            await page.keyboard.press("ArrowDown")
            await page.keyboard.press("Enter")
            await page.wait_for_selector("#chosen button.danger")
            store = it.backend.store
            assert store is not None
            # The picture, the list and the catalog agree on what is evicted first.
            catalog = store.catalog
            worst = min(catalog.snapshots, key=catalog.value)
            assert await page.locator("#next li span").first.get_attribute("title") == worst
            await page.locator("#icicle button.snapshot", has_text=re.compile("tokens")).first.click()
            order = (
                "import('./store.js').then(({ treeOf }) => { const row = (id, value, more) => ({ id, value,"
            )
            order += (
                " model: 'm', is_served: true, is_pinned: false, size_bytes: 1, share_bytes: 0, last_used: 0,"
            )
            order += " n_common: 0, n_hits: 0, ...more }); const rows = [row('a', 2), row('b', 1, { is_pinned: true }),"
            order += " row('c', 1), row('d', 9, { is_served: false })];"
            order += " treeOf(rows); return rows.map((its) => its.place); })"
            assert await page.evaluate(order) == [3, None, 2, 1]
            n_snapshots = len(store.catalog.snapshots)
            await page.focus("#chosen button.danger")
            await page.keyboard.press("Enter")
            assert await page.evaluate("document.activeElement.id") == "ask-no"
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Enter")
            await it.until(lambda: len(store.catalog.snapshots) == n_snapshots - 1)

            await page.focus("#flights button")
            await page.keyboard.press("Enter")
            await page.keyboard.press("Shift+Tab")
            await page.keyboard.press("Enter")
            assert (await asked).status == 410
            await page.wait_for_selector("#requests tr.cancelled")  # told by the stream
            assert not any(ADMIN_KEY in address for address in addresses)
            assert all("401" in one for one in said)  # Chromium reports each refused request

            it.fake.go()
            await it.fake.kill()
            it.backend.doubt()
            await page.wait_for_selector(".backend.down")
            assert (await it.ask("x")).status == 503
            line = page.locator("#outages .bad")
            await line.filter(has_text="1 request was not served.").wait_for()
            told = await line.inner_text()
            assert re.match(
                r"gpu0 is down since [\d:]+ \(\d+ s\)\. llama-server at http\S+ (refuses|does)", told
            ), told
            assert "--port" not in told  # it was up before
            assert await page.evaluate(CONNECTION) == "gpu0 is down"
            assert "not served: llama-server at" in await page.locator("#requests tr.unserved").inner_text()
            await it.fake.start()
            await page.wait_for_selector(".backend:not(.down) .slot")
            told = await page.locator("#outages .over").inner_text()
            assert re.match(
                r"gpu0 is up again. It was down for \d+ s, from [\d:]+ to [\d:]+. 1 request was not served.",
                told,
            ), told
            assert await page.evaluate(CONNECTION) == "live, gpu0 is up"

            await it.stop()
            await page.wait_for_function(f"{CONNECTION}.startsWith('no connection since ')")
            await page.evaluate(
                "new Promise((done) => setTimeout(done, 1100))"
            )  # what counts each second is silent
            assert (await page.evaluate(CONNECTION)).startswith("no connection since ")
            assert "goes on by itself" in await page.locator("#notice").inner_text()
            await it.start()
            await live(page)
            await page.locator("#notice").wait_for(state="hidden")
