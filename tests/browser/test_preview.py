"""The page plays a generation while it is made."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgx_music.artifacts import LocalArtifacts
from tests.browser.acting import enqueue, until, wait_for_row

pytestmark = pytest.mark.browser

SECONDS = b"\1\0" * 32_000 * 5


def publish(folder, generation_id):
    """Publish the first seconds of its first attempt: the tone engine has no preview of its own."""
    work = LocalArtifacts(folder).publish_preview(generation_id, 1, 0, SECONDS)
    with ThreadPoolExecutor(1) as threads:  # playwright's event loop runs in this one
        threads.submit(asyncio.run, work).result()


def test_a_generation_is_heard_while_it_is_made(page, server, shared):
    enqueue(page, duration="120")
    row = wait_for_row(page, "processing")
    publish(shared[1].parent / "audio", row.get_attribute("id"))
    page.click(".row .prompt")
    page.click("text=Listen while it is made")
    until(page, "document.getElementById('audio').currentTime > 0")
    assert page.is_hidden("#save")
    assert wait_for_row(page, "processing")
    page.click("#detail [data-do=cancel]")
    wait_for_row(page, "cancelled")
    page.wait_for_selector("text=Listen while it is made", state="detached")
