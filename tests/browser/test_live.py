"""The page while things change elsewhere: other browsers, a lost stream, a slow network, many rows."""

from __future__ import annotations

import math
import sqlite3
import struct
import wave
from contextlib import closing

import pytest

from tests.browser.acting import enqueue, play_first, post, until, wait_for_row

pytestmark = pytest.mark.browser

MANY = 10_000
MOST_BYTES = 60_000
WATCH_SHIFTS = """
    window.shifts = [];
    new PerformanceObserver((list) => {
        for (const each of list.getEntries()) if (!each.hadRecentInput)
            window.shifts.push(...each.sources.map(({ node }) => node?.outerHTML?.slice(0, 80)));
    }).observe({ type: "layout-shift", buffered: true });
"""
SENT_BYTES = """
    [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
        .filter(({ initiatorType }) => initiatorType !== "xmlhttprequest" && initiatorType !== "other")
        .reduce((sum, each) => sum + each.transferSize, 0)
"""


def live(visit, server, **options):
    page = visit(server.address, **options)
    page.wait_for_selector("#live[data-state=live]")
    return page


def first_id(server):
    return server.ask("/v1/generations")[1]["generations"][0]["id"]


def fill(file, count):
    """Copy the newest generation so often, each as old as the next."""
    with closing(sqlite3.connect(file)) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(generations)")]
        names = ", ".join(columns)
        values = ", ".join(
            {"id": "printf('00000000-0000-7000-8000-%012d', n)"}.get(name, name) for name in columns
        )
        numbers = f"WITH seq(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM seq WHERE n < {count})"
        database.execute(
            f"{numbers} INSERT INTO generations ({names}) SELECT {values} FROM generations, seq"
        )


def test_two_browsers_see_each_other(visit, server):
    one, other = live(visit, server), live(visit, server)
    post(server, "/v1/pause", {})
    enqueue(one, "of one")
    wait_for_row(other, "pending")

    other.click(".row [data-do=star]")
    one.wait_for_selector(".row [data-do=star][aria-pressed=true]")
    one.click(".row [data-do=cancel]")
    wait_for_row(other, "cancelled")
    other.on("dialog", lambda dialog: dialog.accept())
    other.click(".row .prompt")
    other.click("#detail [data-do=remove]")

    assert until(one, "document.querySelectorAll('.row').length === 0")
    other.wait_for_selector("#detail", state="hidden")


def test_a_change_is_fetched_alone(page, server):
    post(server, "/v1/pause", {})
    for number in range(3):
        post(server, "/v1/generations", {"prompt": f"number {number}"})
    page.wait_for_selector(".row")
    page.reload()
    page.wait_for_selector("#live[data-state=live]")
    asked = []
    page.on("request", lambda each: asked.append(each.url) if "/?" in each.url else None)
    last = page.query_selector_all(".row")[-1].get_attribute("id")
    post(server, f"/v1/generations/{last}/cancel", {})
    wait_for_row(page, "cancelled")
    post(server, "/v1/generations", {"prompt": "one more"})
    page.wait_for_selector("#fresh:not([hidden])")

    assert asked
    assert all("ids=" in url for url in asked)
    assert page.inner_text("#tools") == "Cancel the 3 that wait"


def test_back_and_forward_keep_filters_details_and_player(page):
    enqueue(page, "lofi rain", duration="24")
    play_first(page)
    page.click("#chips >> text=Done")
    page.wait_for_selector("#chips [aria-current]:has-text('Done')")
    page.click(".row .prompt")
    page.wait_for_selector("#of-detail")

    page.go_back()
    page.wait_for_selector("#detail", state="hidden")
    page.go_back()
    until(page, "document.querySelector('#chips [aria-current]').textContent === 'All'")
    page.go_forward()
    page.go_forward()

    page.wait_for_selector("#of-detail")
    assert page.inner_text("#chips [aria-current]") == "Done"
    assert page.evaluate("!document.getElementById('audio').paused")


def test_a_tab_that_was_away_for_long_catches_up(page, server):
    """A tab that is not seen closes its stream, and the server forgets it."""
    enqueue(page, "of mine", duration="16")
    wait_for_row(page, "processing")
    show(page, is_hidden=True)
    post(server, "/v1/generations", {"prompt": "of others", "duration": 1})
    while server.ask("/v1/stats")[1]["completed_generations"] < 2:
        page.wait_for_timeout(100)
    assert page.get_attribute(".row", "data-status") == "processing"

    show(page, is_hidden=False)

    wait_for_row(page, "completed")
    page.wait_for_selector("#fresh:has-text('1 new')")
    page.wait_for_selector("#live[data-state=live]")


def show(page, *, is_hidden):
    """Let the page believe that its tab is hidden, or seen."""
    value = str(is_hidden).lower()
    page.evaluate(
        f"Object.defineProperty(document, 'hidden', {{ value: {value}, configurable: true }});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )


def test_rows_that_fit_a_filter_no_longer_leave_its_list(page, server):
    enqueue(page, duration="16")
    wait_for_row(page, "processing")
    page.click("#chips >> text=Running")
    page.wait_for_selector("#chips [aria-current]:has-text('Running')")
    wait_for_row(page, "processing")
    page.focus(".row .prompt")

    assert until(page, "document.querySelectorAll('.row').length === 0")
    assert page.evaluate("document.activeElement.id") == "rows"


def test_a_slow_network_changes_nothing_but_the_time(visit, server):
    for number in range(50):
        post(server, "/v1/generations", {"prompt": f"lofi rain, number {number}", "duration": 0.1})
    page = visit("about:blank")
    session = page.context.new_cdp_session(page)
    conditions = {"offline": False, "latency": 300, "downloadThroughput": 50_000}
    session.send("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": 50_000})
    page.goto(server.address)
    page.wait_for_selector("#live[data-state=live]")

    assert 20_000 < page.evaluate(SENT_BYTES) <= MOST_BYTES
    page.fill("#prompt", "of mine")
    page.dblclick("#generate")

    page.wait_for_selector(".row .prompt:has-text('of mine')")
    assert [row["prompt"] for row in server.ask("/v1/generations?limit=2")[1]["generations"]] == [
        "of mine",
        "lofi rain, number 49",
    ]


def test_ten_thousand_rows_are_pages_that_scroll(visit, shared, server):
    post(server, "/v1/pause", {})
    post(server, "/v1/generations", {"prompt": "one of many", "duration": 1})
    fill(shared[1], MANY)
    page = live(visit, server)

    assert page.evaluate("document.querySelectorAll('.row').length") == 50
    assert len(page.request.get(server.address).body()) <= MOST_BYTES
    assert page.inner_text("#tools") == f"Cancel the {MANY + 1} that wait"
    page.mouse.move(400, 600)
    page.mouse.wheel(0, 2_000)
    assert until(page, "scrollY > 1000")
    first = page.get_attribute(".row", "id")
    page.click("#older")
    until(page, f"document.querySelector('.row').id !== '{first}'")
    assert page.evaluate("document.activeElement.className") == "prompt"
    page.go_back()
    assert until(page, f"document.querySelector('.row').id === '{first}'")


def test_nothing_shifts_while_rows_arrive_and_change(page, server):
    enqueue(page, "of mine")
    wait_for_row(page)
    page.evaluate(WATCH_SHIFTS)
    page.mouse.move(5, 5)
    page.wait_for_timeout(600)  # what follows a click is not counted for half a second
    page.evaluate("window.shifts.length = 0")
    before = page.locator(".row").bounding_box()
    for number in range(5):
        post(server, "/v1/generations", {"prompt": f"number {number}", "duration": 1})
    post(server, f"/v1/generations/{page.get_attribute('.row', 'id')}/again", {})
    until(page, "document.getElementById('fresh').textContent === '6 new'")
    until(page, "document.getElementById('counts').textContent === '0 running · 0 waiting'")

    assert page.locator(".row").bounding_box() == before
    assert page.evaluate("window.shifts") == []


@pytest.mark.parametrize(
    "place", [".row .prompt", ".row [data-do=star]", ".row [data-do=cancel]", "#prompt", "#q"]
)
def test_the_focus_is_never_lost(page, server, place):
    post(server, "/v1/pause", {})
    enqueue(page, duration="16")
    wait_for_row(page, "pending")
    page.focus(place)
    post(server, "/v1/resume", {})
    wait_for_row(page, "processing")
    assert page.evaluate("document.activeElement !== document.body")
    wait_for_row(page)

    kept = ".row .prompt" if "cancel" in place else place
    assert page.evaluate(f"document.activeElement === document.querySelector('{kept}')")


def test_what_is_typed_survives_changes(page, server):
    post(server, "/v1/pause", {})
    enqueue(page, duration="1")
    page.click(".row .prompt")
    page.fill("#detail [name=title]", "half a ti")
    post(server, "/v1/resume", {})
    wait_for_row(page)
    page.wait_for_timeout(300)

    assert page.input_value("#detail [name=title]") == "half a ti"
    assert page.evaluate("document.activeElement.name") == "title"


def tone(seconds):
    """Return a WAV file with a tone."""
    from io import BytesIO

    file = BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 32_000, 0, "NONE", ""))
        frames = (round(9_000 * math.sin(at / 12)) for at in range(round(32_000 * seconds)))
        sound.writeframes(b"".join(struct.pack("<h", frame) for frame in frames))
    return {"name": "riff.wav", "mimeType": "audio/wav", "buffer": file.getvalue()}


def test_a_clip_is_sent_and_used(page, server):
    page.click("#composer summary")
    page.set_input_files("#clip", tone(1.5))
    page.wait_for_selector("#clip-said:has-text('1.5 s of audio are there.')")
    enqueue(page, "goes on", duration="4")
    wait_for_row(page)

    row = server.ask(f"/v1/generations/{first_id(server)}")[1]
    assert (row["prompt"], row["continuation_sha256"] is None) == ("goes on", False)


def test_a_clip_that_is_none_is_said_and_the_prompt_is_kept(visit, server):
    page = live(visit, server, may_say="415")
    page.click("#composer summary")
    page.set_input_files("#clip", {**tone(0.1), "buffer": b"no audio"})
    page.wait_for_selector("#clip-said:has-text('is not audio')")
    enqueue(page, "goes on")

    page.wait_for_selector("#problem:has-text('is not audio')")
    assert page.input_value("#prompt") == "goes on"


def test_other_formats_are_offered_and_saved(page):
    enqueue(page)
    wait_for_row(page)
    page.click(".row .prompt")
    with page.expect_download() as download:
        page.click("#detail >> text=MP3")

    assert download.value.suggested_filename.endswith(".mp3")
