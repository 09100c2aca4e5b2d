"""Live: what viewers hear of generations and of the queue, and when."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from dgx_music.client.labels import label_generation
from dgx_music.client.tokens import create_token
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import delete_generation, queue
from dgx_music.storage.database import Database
from dgx_music.web import WebOptions, create_app, hub
from dgx_music.web.history import EVENTS_KEPT, History
from dgx_music.web.hub import Pace
from dgx_music.web.site import Site
from dgx_music.web.viewers import MOST_WAITING, Kind
from tests.factories import SQLITE, add_generation, claim_one, completion_of, on
from tests.patience import PATIENCE
from tests.web.streams import Stream

pytestmark = pytest.mark.any_driver

QUICK = {"look_seconds": 0.02, "least_seconds": 0.001, "finished_seconds": 0.02}


@pytest.fixture
def serve(default_database, output):
    """Returns an application and its hub, which by default looks often, and at everything."""

    def make(pace=None, **options):
        site = Site(None, WebOptions(**{"is_open": True} | options))
        site.hub.pace = Pace(**QUICK | (pace or {}))
        return create_app(options=site.options, site=site), site

    return make


async def add(database, count=1, **values):
    async with database.session() as session:
        rows = [await add_generation(session, **values) for _ in range(count)]
    return [row.id for row in rows]


def watch(app, *ids, **options):
    return Stream(app, f"/v1/events?ids={','.join(ids)}" if ids else "/v1/events", **options)


async def test_a_life_is_seen_in_order_to_its_end(serve, default_database):
    (row_id,) = await add(default_database)
    app, _ = serve()
    async with Stream(app, f"/v1/generations/{row_id}/events") as stream:
        seen = [(await stream.next()).data["generations"][0]]
        async with default_database.session() as session:
            lease = await claim_one(session)
        seen.append((await stream.next()).data)
        async with default_database.session() as session:
            await queue.renew(session, {lease: 0.5}, lease_seconds=30.0)
        seen.append((await stream.next()).data)
        async with default_database.session() as session:
            await queue.complete(session, [completion_of(lease)])
        (last,) = await stream.rest()

    assert [(each["status"], each["progress"]) for each in seen] == [
        ("pending", 0.0),
        ("processing", 0.0),
        ("processing", 0.5),
    ]
    assert (last.kind, last.data["status"]) == ("generation", "completed")
    assert last.data["urls"]["audio"] == f"/v1/generations/{row_id}/audio"
    async with Stream(app, f"/v1/generations/{row_id}/events", last_id=last.id) as again:
        assert again.status == 204


async def test_the_headers_let_no_proxy_keep_it(serve, default_database):
    app, _ = serve()
    async with watch(app) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        assert stream.headers["x-accel-buffering"] == "no"
        assert stream.headers["x-content-type-options"] == "nosniff"
        assert "content-length" not in stream.headers


async def test_a_hint_is_enough(serve, default_database):
    (row_id,) = await add(default_database, worker_id="worker-1")
    app, _ = serve({"look_seconds": 1_000.0, "finished_seconds": 1_000.0})
    async with watch(app, row_id) as stream:
        assert (await stream.next()).kind == "snapshot"
        async with default_database.session() as session:
            await queue.complete(session, [completion_of(queue.Lease(row_id, 1))])

        assert (await stream.next_of("generation")).data["status"] == "completed"


async def test_finished_rows_are_watched_too(serve, default_database):
    (row_id,) = await add(default_database, status="failed")
    app, _ = serve()
    async with watch(app, row_id) as stream:
        await stream.next()
        await label_generation(row_id, starred=True)
        assert (await stream.next_of("generation")).data["starred"] is True
        async with default_database.session() as session:
            await delete_generation(session, row_id)
        assert (await stream.next_of("gone")).data == {"id": row_id}


async def test_a_stream_ends_with_the_row_that_is_deleted(serve, default_database):
    (row_id,) = await add(default_database)
    app, _ = serve()
    async with Stream(app, f"/v1/generations/{row_id}/events") as stream:
        await stream.next()
        async with default_database.session() as session:
            await delete_generation(session, row_id)

        assert [told.kind for told in await stream.rest()] == ["gone"]


async def test_the_queue_is_counted_and_says_its_newest(serve, default_database):
    app, _ = serve()
    async with watch(app) as stream:
        snapshot = (await stream.next()).data
        (row_id,) = await add(default_database)
        told = await stream.next()

    assert snapshot["queue"]["newest_id"] is None
    assert (told.kind, told.data["newest_id"]) == ("queue", row_id)
    assert told.data["counts"] == {
        "pending": 1,
        "processing": 0,
        "completed": 0,
        "failed": 0,
        "cancelled": 0,
    }


async def test_a_viewer_that_comes_again_gets_what_it_missed(serve, default_database):
    (row_id,) = await add(default_database)
    app, _ = serve()
    async with watch(app, row_id) as other, watch(app, row_id) as stream:
        await other.next()
        last_id = (await stream.next()).id
        await stream.__aexit__()
        titles = ["first", "second"]
        for title in titles:
            await label_generation(row_id, title=title)
            await other.next_of("generation")
        async with watch(app, row_id, last_id=last_id) as again:
            missed = [await again.next() for _ in range(3)]

    assert [told.data["title"] for told in missed[:2]] == titles
    assert missed[2].kind == "queue"


async def test_of_the_queue_only_the_latest_is_missed(serve, default_database):
    (row_id,) = await add(default_database)
    app, _ = serve()
    async with watch(app) as other, watch(app, row_id) as stream:
        last_id = (await stream.next()).id
        await stream.__aexit__()
        for _ in range(2):
            (newest,) = await add(default_database)
            await other.next_of("queue")
        async with watch(app, row_id, last_id=last_id) as again:
            told = await again.next()
            await label_generation(row_id, title="new")

            assert (told.kind, told.data["newest_id"]) == ("queue", newest)
            assert (await again.next()).kind == "generation"


async def test_what_changed_while_nobody_watched_is_not_lost(serve, default_database):
    (row_id,) = await add(default_database)
    app, site = serve()
    async with watch(app, row_id) as stream:
        last_id = (await stream.next()).id
    assert await rests(site)
    await label_generation(row_id, title="new")

    async with watch(app, row_id, last_id=last_id) as again:
        told = await again.next()
    assert (told.kind, told.data["title"]) == ("generation", "new")


@pytest.mark.parametrize("last_id", ["x", "00000000-0", "{epoch}-7", "{epoch}-²", "{epoch}-"])
async def test_an_unknown_place_begins_with_a_snapshot(serve, default_database, last_id):
    (row_id,) = await add(default_database)
    app, _ = serve()
    async with watch(app, row_id) as stream:
        epoch = (await stream.next()).id.partition("-")[0]
        async with watch(app, row_id, last_id=last_id.format(epoch=epoch)) as again:
            told = await again.next()

    assert told.kind == "snapshot"
    assert [row["id"] for row in told.data["generations"]] == [row_id]


async def test_a_row_that_was_not_watched_then_begins_with_a_snapshot(serve, default_database):
    first, second = await add(default_database, 2)
    app, _ = serve()
    async with watch(app, first) as stream:
        last_id = (await stream.next()).id
        await label_generation(first, title="new")
        await stream.next_of("generation")
        async with watch(app, first, second, last_id=last_id) as other:
            assert (await other.next()).kind == "snapshot"


def test_only_the_last_events_are_kept():
    history = History()
    first = history.add(Kind.STALE, {})
    for _ in range(EVENTS_KEPT):
        last = history.add(Kind.STALE, {})
    assert history.number_of(first.id) == 1
    assert len(history.after(1)) == EVENTS_KEPT

    history.add(Kind.STALE, {})

    assert history.number_of(first.id) is None
    assert [event.id for event in history.after(EVENTS_KEPT + 1)] != [last.id]


async def test_more_events_than_may_wait_become_a_snapshot(serve, default_database):
    ids = await add(default_database, MOST_WAITING + 1)
    app, _ = serve()
    async with watch(app, *ids) as stream:
        await stream.next()
        async with default_database.session() as session:
            for each in ids:
                await queue.cancel(session, each)
        told = await stream.next()

    assert told.kind == "snapshot"
    assert {row["status"] for row in told.data["generations"]} == {"cancelled"}


async def test_a_slow_reader_blocks_nobody(serve, default_database):
    (row_id,) = await add(default_database)
    app, _site = serve()
    async with watch(app, row_id, room=2) as slow, watch(app, row_id) as stream:
        await stream.next()
        for number in range(MOST_WAITING + 5):
            await label_generation(row_id, title=str(number))
            told = await stream.next_of("generation")
            assert told.data["title"] == str(number)
        kinds = [await slow.next(), await slow.next()]
        while kinds[-1].kind != "snapshot":
            kinds.append(await slow.next())

    assert kinds[-1].data["generations"][0]["title"] == str(MOST_WAITING + 4)
    assert len(kinds) < MOST_WAITING


async def test_a_stream_without_news_says_that_it_lives(serve, default_database):
    app, _ = serve({"ping_seconds": 0.01})
    async with watch(app) as stream:
        await stream.comment()
        await stream.comment()

    assert stream.comments >= 2


async def test_streams_live_while_the_database_does_not_answer(
    serve, default_database, monkeypatch
):
    (row_id,) = await add(default_database)
    app, _ = serve({"ping_seconds": 0.01})

    async def hang(*_args, **_options):
        await anyio.sleep_forever()

    async with watch(app, row_id) as stream:
        await stream.next()
        monkeypatch.setattr(Database, "transact", hang)
        for _ in range(3):
            await stream.comment()
        monkeypatch.undo()

    assert stream.comments >= 3


@pytest.mark.parametrize("room", [1, 1_000])
async def test_all_streams_end_with_the_server(serve, default_database, room):
    app, site = serve()
    async with watch(app, room=room) as stream, watch(app) as other:
        await other.next()
        site.stops.stop()

        await other.rest()
        await asyncio.wait([stream._answering], timeout=PATIENCE)
        assert other.is_ended
        assert stream._answering.done()
    assert await rests(site)


async def test_a_stream_ends_after_a_while_so_that_its_token_is_asked_again(
    serve, default_database
):
    app, _ = serve({"stream_seconds": 0.05})
    async with watch(app) as stream:
        await stream.rest()

    assert stream.is_ended


async def rests(site):
    """Return True once the hub does nothing; False if that does not come."""
    with anyio.move_on_after(PATIENCE) as waiting:
        while site.hub._running is not None and not site.hub._running.done():
            await asyncio.sleep(0.005)
    return not waiting.cancelled_caught


@pytest.fixture
def transactions(monkeypatch):
    """The transactions since the test began; raising one's error if there is one."""
    made: list[object] = []
    transact = Database.transact

    async def counted(self, work, **options):
        made.append(work)
        return await transact(self, work, **options)

    monkeypatch.setattr(Database, "transact", counted)
    return made


async def test_nothing_is_read_while_nobody_watches(serve, default_database, transactions):
    app, site = serve()
    async with watch(app) as stream:
        await stream.next()
    assert await rests(site)
    count = len(transactions)

    await asyncio.sleep(QUICK["look_seconds"] * 5)

    assert len(transactions) == count > 0


async def test_the_hub_rests_as_soon_as_all_have_left(serve, default_database):
    app, site = serve({"look_seconds": 1_000.0, "ping_seconds": 0.2})
    async with watch(app) as stream:
        await stream.comment()  # by then the hub waits
    assert await rests(site)


async def test_many_viewers_share_a_look(serve, default_database, transactions):
    (row_id,) = await add(default_database)
    app, _ = serve({"look_seconds": 1_000.0, "finished_seconds": 1_000.0, "least_seconds": 0.1})
    streams = [watch(app, row_id) for _ in range(100)]
    async with watch(app, row_id) as first:
        await first.next()
        count = len(transactions)
        async with anyio.create_task_group() as tasks:
            for each in streams:
                tasks.start_soon(each.__aenter__)
        for each in streams:
            await each.next()
        assert len(transactions) - count < 10
        for each in streams:
            await each.__aexit__()


async def test_a_tenant_hears_of_its_own_only(serve, default_database):
    (own,) = await add(default_database, tenant="label-7")
    (others,) = await add(default_database)
    secret = (await create_token("shop", "read", tenant="label-7")).secret
    app, _ = serve()
    token = f"Bearer {secret}"
    operators = f"Bearer {await operators_secret()}"
    async with (
        watch(app, own, others, token=token) as stream,
        watch(app, token=operators) as operator,
    ):
        snapshot = (await stream.next()).data
        await operator.next()
        await label_generation(others, title="secret")
        async with default_database.session() as session:
            await delete_generation(session, others)
        await add(default_database)
        await operator.next_of("queue")
        await label_generation(own, title="ours")
        told = await stream.next()

    assert [row["id"] for row in snapshot["generations"]] == [own]
    assert snapshot["gone"] == [others]
    assert snapshot["queue"] == {"newest_id": own}
    assert (told.kind, told.data["title"]) == ("generation", "ours")
    assert "worker_id" not in told.data


async def test_another_tenants_generation_is_not_there(serve, default_database):
    (others,) = await add(default_database)
    secret = (await create_token("shop", "read", tenant="label-7")).secret
    app, _site = serve()
    async with watch(app, others, token=f"Bearer {await operators_secret()}") as stream:
        last_id = (await stream.next()).id
        for path in (others, "nothing", "%00"):
            for known in ("", last_id):
                path = f"/v1/generations/{path}/events"
                async with Stream(app, path, token=f"Bearer {secret}", last_id=known) as refused:
                    assert refused.status == 404


async def operators_secret():
    return (await create_token("operator", "operate")).secret


async def test_each_sees_of_a_row_what_it_may(serve, default_database):
    (row_id,) = await add(default_database, worker_id="worker-1")
    reader = (await create_token("reader", "read")).secret
    app, _ = serve()
    for secret, is_seen in [(reader, False), (await operators_secret(), True)]:
        async with watch(app, row_id, token=f"Bearer {secret}") as stream:
            (row,) = (await stream.next()).data["generations"]
        assert ("worker_id" in row) == is_seen


@pytest.mark.parametrize("query", [f"ids={','.join(map(str, range(201)))}", "id=x", "ids=a%0Ab"])
async def test_a_wrong_list_of_ids_is_refused(serve, query):
    app, site = serve()
    async with Stream(app, f"/v1/events?{query}") as stream:
        assert stream.status == 422
        assert (await stream.body())["field"] in ("ids", "id")
    assert site.hub._running is None


async def test_there_is_room_for_so_many_streams(serve, default_database):
    app, _ = serve(most_streams=1)
    async with watch(app), watch(app) as refused:
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert (await refused.body())["type"] == "urn:dgx-music:too-many-streams"
    async with watch(app) as stream:
        assert stream.status == 200


async def test_so_many_rows_may_be_watched(serve, default_database, monkeypatch):
    monkeypatch.setattr(hub, "MOST_WATCHED", 2)
    ids = await add(default_database, 3)
    app, _ = serve()
    async with watch(app, *ids[:2]), watch(app, ids[0]) as same, watch(app, ids[2]) as refused:
        assert (same.status, refused.status) == (200, 503)


async def test_streams_outlast_a_database_that_is_away(serve, default_database, monkeypatch):
    (row_id,) = await add(default_database)
    app, _ = serve()
    transact, is_away = Database.transact, False

    async def maybe(self, work, **options):
        if is_away:
            raise DatabaseUnavailableError("it", "it is away")
        return await transact(self, work, **options)

    monkeypatch.setattr(Database, "transact", maybe)
    async with watch(app, row_id) as stream:
        await stream.next()
        is_away = True
        away = await stream.next()
        async with watch(app, row_id) as late:
            assert (late.status, late.headers["retry-after"]) == (503, "5")
        is_away = False
        back = await stream.next()
        await label_generation(row_id, title="new")

        assert [(each.kind, each.data) for each in (away, back)] == [
            ("stale", {"stale": True}),
            ("stale", {"stale": False}),
        ]
        assert (await stream.next_of("generation")).data["title"] == "new"


@on(SQLITE)
async def test_a_mistake_of_the_hub_ends_the_streams(serve, default_database, monkeypatch):
    app, site = serve()
    async with watch(app) as stream:
        await stream.next()
        monkeypatch.setattr(site.hub, "_plan", None)

        await stream.rest()
    monkeypatch.undo()
    async with watch(app) as stream:
        assert (await stream.next()).kind == "snapshot"
