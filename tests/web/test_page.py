"""The page as the server makes it: its frame, its forms without scripts, and the log-in."""

from __future__ import annotations

import gzip
import json
import re
from html import unescape
from pathlib import Path

import pytest
from fastapi import FastAPI

from dgx_music.client.logins import LASTS_SECONDS
from dgx_music.client.tokens import create_token, revoke_token
from dgx_music.storage import list_generations, queue
from dgx_music.web import WebOptions, music_lifespan, music_router, shell
from dgx_music.web.shell import FILES, VERSION
from dgx_music.web.site import LOGINS_PER_MINUTE
from tests.factories import add_generation, claim_one, completion_of

HOSTILE = "<img src=x onerror=alert(1)>"
RTL = "\u202eموسيقى\u202c"
MOST_BYTES = 60_000
MOST_CODE = 40 * 1024


@pytest.fixture
def database_url(sqlite_url):
    """One kind of database is enough: these tests are about HTTP."""
    return sqlite_url


async def add(database, **values):
    async with database.session() as session:
        return await add_generation(session, **values)


async def add_completed(database, **values):
    async with database.session() as session:
        row = await add_generation(session, **values)
        lease = await claim_one(session)
    async with database.session() as session:
        await queue.complete(session, [completion_of(lease)])
    return row.id


async def rows_of(database):
    page = await database.transact(lambda session: list_generations(session), read_only=True)
    return page.generations


async def key_of(client):
    return re.search(r'idempotency_key" value="([^"]+)"', (await client.get("/")).text)[1]


# ---- what is sent


async def test_the_page_is_html_and_is_kept_by_nobody(client):
    answer = await client.get("/")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy


async def test_nothing_in_the_page_needs_more_than_the_policy_allows(client, default_database):
    await add(default_database)
    text = (await client.get("/")).text

    assert "style=" not in text
    assert not re.search(r"\son[a-z]+=", text)
    assert not re.search(r"<script(?![^>]*\ssrc=)", text)
    assert not re.search(r'(?:src|href|action)="(?:https?:)?//', text)


@pytest.mark.parametrize("name", FILES)
async def test_its_files_are_sent_compressed_and_kept_for_ever(client, name):
    answer = await client.get(f"/page/{VERSION}/{name}")

    assert answer.status_code == 200
    assert answer.content == gzip.decompress(FILES[name][0])
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_page_names_only_files_that_there_are(client):
    named = re.findall(rf"/page/{VERSION}/([a-z.]+)", (await client.get("/")).text)

    assert {*named} == FILES.keys()


@pytest.mark.parametrize(
    "path",
    ["/page/0/app.js", f"/page/{VERSION}/nothing.js", f"/page/{VERSION}/..%2fpage.py", "/page/x"],
)
async def test_no_other_file_is_sent(client, path):
    assert (await client.get(path)).status_code == 404


async def test_first_paint_needs_little(client, default_database):
    for number in range(50):
        await add(default_database, prompt=f"lofi rain with vinyl crackle, number {number}")
    page = len((await client.get("/")).content)

    assert page + sum(len(content) for content, _ in FILES.values()) <= MOST_BYTES


def test_its_code_is_small():
    """Scripts, styles and templates, as they are in the repository."""
    folders = [Path(shell.__file__).parent / name for name in ("static", "templates")]

    assert sum(path.stat().st_size for each in folders for path in each.iterdir()) <= MOST_CODE


# ---- without scripts


async def test_the_list_shows_prompts_as_text_only(client, default_database):
    await add(default_database, prompt=HOSTILE)
    await add(default_database, prompt="</a><script>alert(1)</script>", title=RTL)

    text = (await client.get("/")).text

    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "<script>" not in text
    assert RTL in text


async def test_a_completed_row_can_be_played_and_saved(client, default_database):
    generation_id = await add_completed(default_database, prompt="lofi rain")

    audio = f"/v1/generations/{generation_id}/audio"
    assert f'data-do="play" href="{audio}"' in (await client.get("/")).text

    detail = (await client.get(f"/?show={generation_id}")).text

    assert f'<audio controls preload="none" src="{audio}">' in detail
    assert f'href="{audio}?download=1&amp;format=wav" download' in detail


async def test_noise_is_called_noise(client, default_database):
    await add(default_database, model_name="musicgen-tiny-untrained")

    assert 'class="noise"' in (await client.get("/")).text


async def test_no_music_is_called_noise(client, default_database):
    await add(default_database, model_name="musicgen-small")

    assert 'class="noise"' not in (await client.get("/")).text


async def test_the_list_takes_the_filters_of_the_api(client, default_database):
    await add(default_database, prompt="lofi rain", is_starred=True)
    await add(default_database, prompt="trap beat")

    text = (await client.get("/", params={"starred": "1", "show": "x", "view": "list"})).text

    assert "lofi rain</a>" in text
    assert "trap beat</a>" not in text


async def test_empty_fields_of_the_filter_leave_the_url(client):
    answer = await client.get("/?q=rain&key=&bpm_from=")

    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=rain")


async def test_a_wrong_filter_is_named_on_the_page(client):
    answer = await client.get("/?status=lost")

    assert answer.status_code == 422
    assert "status" in answer.text
    assert "<form" in answer.text


async def test_longer_lists_have_a_link_to_older_ones(client, default_database):
    for number in range(3):
        await add(default_database, prompt=f"number {number}")

    first = (await client.get("/?limit=2")).text
    link = re.search(r'id="older"[^>]* href="([^"]+)"', first)[1].replace("&amp;", "&")

    assert "number 0</a>" in (await client.get(link)).text


async def test_an_empty_list_says_how_to_begin(client):
    text = (await client.get("/")).text

    assert "Nothing here yet" in text
    assert "dgx-music worker" in text


async def test_a_form_enqueues_and_leads_back(client, default_database):
    form = {"prompt": "lofi rain", "duration": "4.5", "variations": "2", "seed": "", "model": ""}

    answer = await client.post("/", data=form)

    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    rows = await rows_of(default_database)
    assert [(row.prompt, row.duration_seconds) for row in rows] == [("lofi rain", 4.5)] * 2


async def test_a_form_that_is_sent_twice_enqueues_once(client, default_database):
    form = {"prompt": "lofi rain", "idempotency_key": await key_of(client)}
    for _ in range(2):
        assert (await client.post("/", data=form)).status_code == 303

    assert len(await rows_of(default_database)) == 1


async def test_a_form_with_files_is_refused(client, default_database):
    answer = await client.post("/", data={"prompt": "a"}, files={"seed": b"1"})

    assert answer.status_code == 422
    assert await rows_of(default_database) == []


@pytest.mark.parametrize(
    ("field", "text"),
    [("duration", "400"), ("duration", "x"), ("variations", "99"), ("seed", "x"), ("colour", "1")],
)
async def test_a_wrong_form_is_shown_again_with_what_it_had(client, default_database, field, text):
    answer = await client.post("/", data={"prompt": HOSTILE, field: text})

    assert answer.status_code == 422
    assert field in re.search(r'id="problem"[^>]*>([^<]*)<', answer.text)[1]
    assert "&lt;img src=x onerror=alert(1)&gt;</textarea>" in answer.text
    assert await rows_of(default_database) == []


@pytest.mark.parametrize("path", ["/", "/login", "/logout"])
@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}]
)
async def test_forms_of_other_sites_change_nothing(client, default_database, path, headers):
    answer = await client.post(path, data={"prompt": "a", "token": "a"}, headers=headers)

    assert answer.status_code == 403
    assert "text/html" in answer.headers["content-type"]
    assert await rows_of(default_database) == []


async def test_details_say_how_it_was_made_and_what_of(client, default_database):
    parent = await add_completed(default_database, prompt="lofi rain", title="Rain")
    child = await add(default_database, prompt="more rain", parent_id=parent)

    text = (await client.get("/", params={"show": child.id, "status": "pending"})).text

    detail = text[text.index('<aside id="detail"') :]
    assert '<h2 id="detail-title" tabindex="-1">more rain</h2>' in detail
    assert "<h3>Made from</h3>" in detail
    assert f'<a href="?status=pending&amp;show={parent}">Rain</a> · done' in detail
    assert "--data-raw" in detail
    assert "<h3>Made from this</h3>" in (await client.get(f"/?show={parent}")).text


async def test_details_of_nothing_say_so_beside_the_list(client, default_database):
    await add(default_database, prompt="lofi rain")

    answer = await client.get("/?show=nothing")

    assert answer.status_code == 404
    assert "There is no generation" in answer.text
    assert "lofi rain</a>" in answer.text


async def test_workers_have_a_view_of_their_own(client):
    text = (await client.get("/?view=workers")).text

    assert "No worker has been seen" in text
    assert 'data-path="pause" data-model="musicgen-small"' in text
    assert '<div id="home" hidden>' in text


async def test_a_status_keeps_the_other_filters(client):
    text = (await client.get("/?q=rain&status=failed")).text

    assert '<a href="/?q=rain&amp;status=failed" aria-current=true>Failed</a>' in text
    assert '<a href="/?q=rain&amp;starred=1">Starred</a>' in text
    assert '<input type="hidden" name="status" value="failed">' in text


@pytest.mark.parametrize(
    ("query", "count"), [("", 3), ("tag=a", 2), ("tag=a&limit=1", 2), ("limit=1", 3)]
)
async def test_what_waits_can_be_cancelled_at_once(client, default_database, query, count):
    for tags in (["a"], ["a"], ["b"]):
        await add(default_database, tags=tags)

    text = (await client.get(f"/?{query}")).text

    assert f'data-count="{count}"' in text
    filters = json.loads(unescape(re.search(r'data-filters="([^"]+)"', text)[1]))
    assert filters["status"] == ["pending"]
    done = await client.post("/v1/generations/cancel", json={"filters": filters, "expected": count})
    assert done.json()["changed"] == count


@pytest.mark.parametrize("query", ["q=rain", "status=failed"])
async def test_what_does_not_wait_cannot_be_cancelled_at_once(client, default_database, query):
    for _ in range(2):
        await add(default_database, prompt="rain")

    assert "data-count" not in (await client.get(f"/?{query}")).text


# ---- for its scripts


async def news(client, rows, query="", since=None):
    """Return what an open page with these rows gets; the last one is the newest that it shows."""
    ids = ",".join(row.id for row in rows)
    return (await client.get(f"/?{query}&since={since or rows[-1].id}&ids={ids}")).text


async def test_of_an_open_page_only_what_changed_is_made_again(client, default_database):
    rows = [await add(default_database, prompt=f"rain {number}") for number in range(3)]
    text = await news(client, rows[1:], since=rows[1].id)

    assert [row.id in text for row in rows] == [False, True, True]
    assert 'id="fresh" class="go" href="/">1 new</a>' in text
    assert 'data-count="3"' in text
    assert "<form" not in text
    assert len(text) < 6_000


async def test_what_does_not_fit_the_filters_is_not_news(client, default_database):
    here, gone = [await add(default_database, status=status) for status in ("pending", "failed")]
    await add(default_database, status="failed")
    text = await news(client, [here, gone], "status=pending&view=workers")

    assert (here.id in text, gone.id in text) == (True, False)
    assert 'id="fresh" class="go" href="/?status=pending" hidden>' in text
    assert "<h1>Models</h1>" in text


@pytest.mark.parametrize("query", ["q=rain", "sort=created", "reverse=0", "after={next}"])
async def test_what_is_no_list_from_the_newest_on_tells_its_rows(client, default_database, query):
    for number in range(3):
        await client.post("/v1/generations", json={"prompt": f"rain {number}"})
    rows = (await rows_of(default_database))[::-1]
    first = (await client.get("/v1/generations?limit=1")).json()
    text = await news(client, [rows[0]], query.format_map(first), since=rows[1].id)

    assert rows[0].id in text
    assert ("1 new" in text) == (not query.startswith("after"))


async def test_news_have_the_details_that_are_open(client, default_database):
    shown, other = [await add(default_database) for _ in range(2)]

    assert f'data-id="{shown.id}"' in await news(client, [other], f"show={shown.id}")


async def test_news_of_another_tenant_are_nobodys(locked, default_database):
    client, secret = await locked(tenant="shop")
    await log_in(client, secret)
    own, other = [await add(default_database, tenant=name) for name in ("shop", "bar")]
    text = await news(client, [other, own], since=own.id)

    assert (own.id in text, other.id in text) == (True, False)
    assert "0 new" in text


@pytest.mark.parametrize("query", ["ids=a", "ids=,&since=a%00", f"since=a&ids={'a,' * 201}"])
async def test_news_of_what_is_no_page_are_refused(client, query):
    numbered = query.replace("a,", "{},").format(*range(201)) if "a," in query else query

    assert (await client.get(f"/?{numbered}")).status_code == 422


# ---- who may


@pytest.fixture
def locked(connect, default_database):
    """Returns a client of an application that needs a token, and a token of this role."""

    async def make(role="operate", **values):
        token = await create_token("shop", role, **values)
        return connect(), token.secret

    return make


async def log_in(client, secret):
    return await client.post("/login", data={"token": secret})


async def test_without_a_login_there_is_only_the_form_for_one(locked, default_database):
    client, _ = await locked()
    await add(default_database, prompt="secret melody")

    answer = await client.get("/")

    assert answer.status_code == 401
    assert 'name="token"' in answer.text
    assert "secret melody" not in answer.text
    assert answer.headers["content-security-policy"]


async def test_a_token_logs_in_for_some_hours(locked):
    client, secret = await locked()

    answer = await log_in(client, f" {secret} ")

    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert secret not in cookie
    for part in ("HttpOnly", "SameSite=strict", f"Max-Age={LASTS_SECONDS}", "Path=/"):
        assert part in cookie
    assert (await client.get("/")).status_code == 200
    assert (await client.get("/v1/generations")).status_code == 200


async def test_over_https_the_cookie_belongs_to_this_host_only(locked):
    client, secret = await locked()
    client.base_url = "https://127.0.0.1:8321"

    cookie = (await log_in(client, secret)).headers["set-cookie"]

    assert cookie.startswith("__Host-dgx-music=")
    assert "Secure" in cookie
    assert (await client.get("/")).status_code == 200


async def test_a_login_ends_with_its_log_out(locked):
    client, secret = await locked()
    await log_in(client, secret)
    cookies = dict(client.cookies)

    answer = await client.post("/logout")
    client.cookies.update(cookies)

    assert answer.status_code == 303
    assert (await client.get("/")).status_code == 401


async def test_a_login_ends_with_its_token(locked):
    client, secret = await locked()
    await log_in(client, secret)
    await revoke_token("shop")

    answer = await client.get("/v1/generations")

    assert (answer.status_code, answer.json()["type"]) == (401, "urn:dgx-music:token-needed")


async def test_a_wrong_token_is_refused_in_words(locked):
    client, _ = await locked()

    answer = await log_in(client, "dgx_" + "a" * 43)

    assert answer.status_code == 401
    assert "not valid" in answer.text
    assert "set-cookie" not in answer.headers


async def test_logins_cannot_be_tried_quickly(locked):
    client, secret = await locked()
    for _ in range(int(LOGINS_PER_MINUTE)):
        await log_in(client, "wrong")

    answer = await log_in(client, secret)

    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0


async def test_a_login_changes_nothing_from_other_sites(locked, default_database):
    client, secret = await locked()
    await log_in(client, secret)

    answer = await client.post(
        "/v1/generations", json={"prompt": "a"}, headers={"Origin": "https://evil.example"}
    )

    assert answer.status_code == 403
    assert await rows_of(default_database) == []


async def test_a_login_is_no_token(locked):
    client, secret = await locked()
    await log_in(client, secret)
    login = client.cookies["dgx-music"]
    client.cookies.clear()

    answer = await client.get("/v1/generations", headers={"Authorization": f"Bearer {login}"})

    assert answer.status_code == 401


async def test_a_reader_gets_no_form(locked, default_database):
    client, secret = await locked("read")
    await log_in(client, secret)

    assert 'id="composer"' not in (await client.get("/")).text
    assert (await client.post("/", data={"prompt": "a"})).status_code == 403


async def test_a_tenant_sees_and_makes_its_own_only(locked, default_database):
    client, secret = await locked("enqueue", tenant="label-7")
    await add(default_database, prompt="of another tenant")
    await log_in(client, secret)

    await client.post("/", data={"prompt": "of mine"})
    text = (await client.get("/")).text

    assert "of mine" in text
    assert "of another tenant" not in text


async def test_a_tenant_sees_no_details_counts_or_parents_of_others(locked, default_database):
    client, secret = await locked("enqueue", tenant="label-7")
    other = await add(default_database, prompt="of another tenant", title="secret")
    own = await add(default_database, prompt="of mine", tenant="label-7", parent_id=other.id)
    await log_in(client, secret)

    assert (await client.get(f"/?show={other.id}")).status_code == 404
    text = (await client.get(f"/?show={own.id}")).text
    assert "secret" not in text
    assert '<span id="counts"></span>' in text
    assert "data-count" not in text


# ---- in another application


async def test_links_lead_to_where_it_is_mounted(connect):
    app = FastAPI(lifespan=music_lifespan)
    app.include_router(music_router(options=WebOptions(is_open=True)), prefix="/a b")
    client = connect(app)

    text = (await client.get("/a b/")).text

    assert f'href="/a%20b/page/{VERSION}/style.css"' in text
    assert 'action="/a%20b/"' in text
    assert (await client.get(f"/a b/page/{VERSION}/app.js")).status_code == 200
    assert (await client.post("/a b/", data={"prompt": "a"})).headers["location"] == "/a%20b/"


async def test_an_application_may_leave_the_page_out(connect):
    app = FastAPI(lifespan=music_lifespan)
    app.include_router(music_router(has_page=False), prefix="/music")

    assert (await connect(app).get("/music/")).status_code == 404
