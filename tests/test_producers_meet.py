"""Producers at the same moment, and whoever watches what another one asks for."""

import asyncio

import pytest

from dgx_music import cancel_generation, enqueue, enqueue_many, watch_generation
from dgx_music.errors import IdempotencyConflictError
from tests.factories import MODEL, POSTGRES, claim_one
from tests.patience import PATIENCE


async def test_watching_tells_of_a_cancel_that_the_worker_has_yet_to_confirm(default_database):
    generation = await enqueue("lofi rain", model=MODEL)
    async with default_database.session() as session:
        await claim_one(session)
    rows = watch_generation(generation.id)
    assert not (await anext(rows)).cancel_requested
    await cancel_generation(generation.id)
    async with asyncio.timeout(PATIENCE):
        latest = await anext(rows)
    await rows.aclose()
    assert (latest.status, latest.cancel_requested) == ("processing", True)


@pytest.mark.parametrize("database_url", POSTGRES, indirect=True)
async def test_batches_with_the_same_keys_in_another_order_wait_and_do_not_deadlock(
    default_database,
):
    async with default_database.session() as first:
        await enqueue("rain", session=first, model=MODEL, idempotency_key="a")
        requests = [{"prompt": "rain", "idempotency_key": key} for key in ("b", "a")]
        second = asyncio.create_task(enqueue_many(requests, model=MODEL))
        await asyncio.wait([second], timeout=0.5)
        await enqueue("rain", session=first, model=MODEL, idempotency_key="b")
    assert [row.idempotency_key for row in await second] == ["b", "a"]


async def test_another_tenant_is_another_request(default_database):
    made = await enqueue("rain", model=MODEL, tenant="a", idempotency_key="k")
    assert made.tenant == "a"
    with pytest.raises(IdempotencyConflictError):
        await enqueue("rain", model=MODEL, tenant="b", idempotency_key="k")
