"""The page in a real browser: what a visitor does, from the first prompt to the last key."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from tests.browser.acting import enqueue, play_first, post, total, until, wait_for_row

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"
RTL = "\u202eموسيقى هادئة"


def test_the_first_visit_ends_with_sound(page):
    page.click("[data-do=example]")
    page.fill("#composer input[name=duration]", "8")
    page.click("#generate")
    wait_for_row(page, "processing")

    play_first(page)
    page.focus("#seek")
    page.keyboard.press("ArrowRight")

    until(page, "document.getElementById('audio').currentTime > 4.9")
    assert re.fullmatch(r"0:0\d of 0:08", page.get_attribute("#seek", "aria-valuetext"))
    assert page.inner_text("#toast").startswith("done: ")
    with page.expect_download() as download:
        page.click("#save")
    assert re.match(r"lofi.rain", download.value.suggested_filename)
    assert download.value.suggested_filename.endswith(".wav")


def test_the_waveform_is_drawn(page):
    enqueue(page)
    play_first(page)

    assert until(page, "document.getElementById('wave').getAttribute('d').split('M').length > 100")


def test_a_click_on_the_waveform_seeks(page):
    enqueue(page, duration="8")
    play_first(page)
    page.keyboard.press("Escape")

    box = page.locator(".waves").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 10)

    assert until(page, "document.getElementById('audio').currentTime > 5.5")


def test_a_double_click_enqueues_once(page, server):
    page.fill("#prompt", "lofi rain")
    page.dblclick("#generate")
    wait_for_row(page)

    assert total(server) == 1


def test_takes_are_enqueued_together(page, server):
    enqueue(page, takes="3")
    until(page, "document.querySelectorAll('.row[data-status=completed]').length === 3")

    assert total(server) == 3
    assert page.is_hidden("#fresh")


def test_what_is_wrong_is_said_and_the_input_is_kept(visit, server):
    page = visit(server.address, may_say="422")
    page.wait_for_selector("#live[data-state=live]")
    page.eval_on_selector("#composer", "form => form.noValidate = true")
    enqueue(page, duration="400")

    until(page, "document.getElementById('problem').textContent.includes('duration')")
    assert page.input_value("#prompt") == "lofi rain"


@pytest.mark.parametrize("prompt", [HOSTILE, RTL])
def test_prompts_are_text_whatever_they_contain(page, prompt):
    enqueue(page, prompt)
    wait_for_row(page)
    page.click(".row .prompt")
    page.wait_for_selector("#detail-title")
    play_first(page)

    for place in (".row .prompt", "#detail-title", "#now"):
        assert page.text_content(place) == prompt
    assert page.query_selector("main img, aside img") is None


def test_filters_are_in_the_url_and_leave_the_player_alone(page):
    enqueue(page, duration="24")
    play_first(page)

    page.click("#chips >> text=Failed")
    until(page, "document.querySelectorAll('.row').length === 0")
    assert page.url.endswith("/?status=failed")
    page.go_back()
    wait_for_row(page)
    page.go_forward()
    until(page, "document.querySelectorAll('.row').length === 0")

    assert page.inner_text("#chips [aria-current]") == "Failed"
    assert page.evaluate("!document.getElementById('audio').paused")


def test_a_search_is_in_the_url_and_survives_a_reload(page, server):
    for prompt in ("lofi rain", "trap beat"):
        post(server, "/v1/generations", {"prompt": prompt, "duration": 1})
    page.fill("#q", "rain")
    page.wait_for_url("**/?q=rain")
    page.reload()

    until(page, "document.querySelectorAll('.row').length === 1")
    assert page.inner_text(".row .prompt") == "lofi rain"
    assert page.input_value("#q") == "rain"


def test_what_another_browser_enqueues_waits_behind_a_button(page, server):
    enqueue(page, "of mine")
    wait_for_row(page)
    post(server, "/v1/generations", {"prompt": "of others", "duration": 1})

    page.wait_for_selector("#fresh:not([hidden])")
    assert page.inner_text("#fresh") == "1 new"
    assert page.inner_text(".row .prompt") == "of mine"
    page.click("#fresh")
    until(page, "document.querySelectorAll('.row').length === 2")
    assert page.evaluate("document.activeElement.textContent") == "of others"


def test_details_are_in_the_url_and_give_the_focus_back(page):
    enqueue(page)
    wait_for_row(page)
    page.click(".row .prompt")
    page.wait_for_selector("#tries")

    assert "show=" in page.url
    assert page.evaluate("document.activeElement.id") == "detail-title"
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.evaluate("document.activeElement.className") == "prompt"


def test_labels_star_again_and_continue(page, server):
    enqueue(page)
    wait_for_row(page)
    page.click(".row .prompt")
    page.fill("#detail [name=title]", "Rain")
    page.fill("#detail [name=tags]", "night, draft")
    page.click("text=Save labels")
    until(page, "document.querySelector('.row .prompt').textContent === 'Rain'")
    page.click("#detail [data-do=star]")
    page.wait_for_selector(".row [data-do=star][aria-pressed=true]")
    page.click("#detail >> text=Again")
    until(page, "document.querySelectorAll('.row[data-status=completed]').length === 2")
    page.click("#detail >> text=Continue")

    until(page, "document.querySelectorAll('.row[data-status=completed]').length === 3")
    rows = server.ask("/v1/generations")[1]["generations"]
    assert [row["starred"] for row in rows].count(True) == 1
    assert rows[-1]["tags"] == ["draft", "night"]
    assert {row["parent_id"] for row in rows} == {None, rows[-1]["id"]}


def test_a_bulk_action_says_its_number_and_does_that(page, server):
    post(server, "/v1/pause", {})
    for number in range(3):
        post(server, "/v1/generations", {"prompt": f"number {number}"})
    page.reload()
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.accept()))
    page.click("text=Cancel the 3 that wait")

    assert until(page, "document.querySelectorAll('.row[data-status=cancelled]').length === 3")
    assert asked == ["Cancel the 3 that wait?"]


def test_a_row_is_cancelled_and_tried_again(page, server):
    post(server, "/v1/pause", {})
    enqueue(page)
    page.click(".row [data-do=cancel]")
    wait_for_row(page, "cancelled")
    assert page.evaluate("document.activeElement.className") == "prompt"
    page.click(".row [data-do=retry]")
    wait_for_row(page, "pending")


def test_workers_are_paused_and_resumed(page, server):
    page.click("nav >> text=Workers")
    page.click("text=Pause all models")
    page.wait_for_selector("text=Resume all models")
    assert page.url.endswith("/?view=workers")
    assert all(model["is_paused"] for model in server.ask("/v1/models")[1]["models"])

    page.click("text=Resume all models")
    page.wait_for_selector("text=Pause all models")


def test_a_restart_of_the_server_is_survived(visit, serve):
    server = serve()
    page = visit(server.address, may_say="net::ERR")
    page.wait_for_selector("#live[data-state=live]")
    enqueue(page, "before", duration="40")
    wait_for_row(page, "processing")

    server.end(signal.SIGTERM)
    page.wait_for_selector("#stale:not([hidden])")
    assert page.inner_text(".row .prompt") == "before"
    serve(server.address.rpartition(":")[2])

    page.wait_for_selector("#live[data-state=live]")
    page.wait_for_selector("#stale", state="hidden")
    wait_for_row(page)


def test_keys_do_what_the_help_says(page):
    enqueue(page, "first")
    wait_for_row(page)
    enqueue(page, "second")
    until(page, "document.querySelectorAll('.row[data-status=completed]').length === 2")
    focused = "document.activeElement.textContent"
    page.evaluate("document.activeElement.blur()")

    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate(focused) == "first"
    page.keyboard.press("k")
    assert page.evaluate(focused) == "second"
    page.keyboard.press("s")
    page.wait_for_selector(".row [data-do=star][aria-pressed=true]")
    page.keyboard.press(" ")
    until(page, "document.getElementById('audio').currentTime > 0")
    page.keyboard.press("/")
    page.keyboard.type("jn?")
    assert page.input_value("#q") == "jn?"


def test_keys_can_be_turned_off(page):
    page.keyboard.press("?")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.keyboard.press("n")

    assert page.evaluate("document.activeElement.id") != "prompt"


def test_without_scripts_there_are_list_enqueue_and_play(visit, server):
    page = visit(server.address, java_script_enabled=False)
    enqueue(page)
    assert page.inner_text(".row .prompt") == "lofi rain"
    row = server.ask("/v1/generations")[1]["generations"][0]
    while server.ask(row["urls"]["self"])[1]["status"] != "completed":
        page.wait_for_timeout(100)
    page.click(".row .prompt")

    assert page.is_visible("#detail audio")
    assert page.is_hidden("[popovertarget]")
    page.click("#close-detail")
    page.click(".row .disc")
    assert page.wait_for_selector("video").evaluate("audio => audio.duration") == 2


def test_a_token_logs_in_and_out(visit, serve, variables):
    server = serve()
    command = [sys.executable, "-m", "dgx_music.cli", "token", "create", "shop", "--role", "read"]
    secret = subprocess.check_output(command, env=variables, text=True).strip()
    page = visit(server.address, may_say="401")
    page.reload()
    for attempt in ("wrong", secret):
        page.fill("#token", attempt)
        page.click("button")
    page.wait_for_selector("#live[data-state=live]")
    assert page.query_selector("#composer") is None

    page.click("text=Log out")
    page.wait_for_selector("#token")


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, server, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    size = {"width": width, "height": 800}
    page = visit(server.address, viewport=size, color_scheme=scheme)
    page.wait_for_selector("#live[data-state=live]")

    def check(what):
        violations = axe.run(page).response["violations"]
        found = [(each["id"], [node["target"] for node in each["nodes"]]) for each in violations]
        assert (what, found) == (what, [])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), what

    check("empty")
    enqueue(page)
    play_first(page)
    check("player")
    page.click(".row .prompt")
    page.wait_for_selector("#tries")
    check("detail")
    page.goto(f"{server.address}/?view=workers")
    page.wait_for_selector("#workers .cards")
    check("workers")


def test_rows_that_arrive_shift_nothing(page, server):
    enqueue(page, "of mine")
    wait_for_row(page)
    before = page.locator(".row").bounding_box()
    for number in range(5):
        post(server, "/v1/generations", {"prompt": f"number {number}", "duration": 1})
    until(page, "document.getElementById('fresh').textContent === '5 new'")

    assert page.locator(".row").bounding_box() == before
