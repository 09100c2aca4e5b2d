"""What visitors do, and how tests wait for what they see."""

from __future__ import annotations

import time

from tests.patience import PATIENCE


def until(page, expression):
    """Wait for the expression, and return its value.

    Playwright's own way to do so needs what the policy forbids.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)
    return value


def enqueue(page, prompt="lofi rain", duration="2", takes="1"):
    page.fill("#prompt", prompt)
    page.fill("#composer input[name=duration]", duration)
    page.fill("#composer input[name=variations]", takes)
    page.click("#generate")


def wait_for_row(page, status="completed", **options):
    return page.wait_for_selector(f".row[data-status={status}]", **options)


def play_first(page):
    wait_for_row(page).query_selector(".disc").click()
    until(page, "document.getElementById('audio').currentTime > 0")


def post(server, path, body):
    status, answer = server.ask(path, body)
    assert status < 300, answer
    return answer


def total(server):
    return server.ask("/v1/stats")[1]["total_generations"]
