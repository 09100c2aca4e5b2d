"""Completions that share a statement: each row has a fence and an answer of its own."""

from dgx_music.storage import queue, repository
from tests.factories import add_generation, claim_up_to, completion_of, read


async def start(database, count):
    async with database.session() as session:
        for _ in range(count):
            await add_generation(session)
        return [claimed.lease for claimed in await claim_up_to(session, count)]


async def complete(database, *completions):
    async with database.session() as session:
        return await queue.complete(session, completions)


async def test_what_was_said_before_is_answered_beside_what_is_new_and_what_is_refused(database):
    said, fresh, cancelled = await start(database, 3)
    await complete(database, completion_of(said))
    async with database.session() as session:
        await queue.cancel(session, cancelled.generation_id)

    done = await complete(database, *[completion_of(lease) for lease in (said, fresh, cancelled)])

    assert done == {said, fresh}
    assert (await read(database, cancelled.generation_id)).status == "processing"


async def test_each_row_gets_its_own_values(database):
    leases = await start(database, 3)
    audio = [{"peak": number / 10, "format": f'a "{number}" \\ é'} for number in range(3)]
    await complete(
        database,
        *[
            completion_of(lease, file_size_bytes=n, audio=audio[n], generation_time_seconds=n)
            for n, lease in enumerate(leases)
        ],
    )

    rows = [await read(database, lease.generation_id) for lease in leases]
    assert [row.file_size_bytes for row in rows] == [0, 1, 2]
    assert [row.get_metadata() for row in rows] == [{"audio": facts} for facts in audio]


async def test_the_attempts_end_with_their_generations_time_and_device_seconds(database):
    leases = await start(database, 2)
    await complete(
        database,
        *[completion_of(lease, generation_time_seconds=n) for n, lease in enumerate(leases)],
    )

    for number, lease in enumerate(leases):
        row = await read(database, lease.generation_id)
        async with database.session(read_only=True) as session:
            (attempt,) = await repository.get_attempts(session, row.id)
        assert (attempt.outcome, attempt.finished_at) == ("completed", row.completed_at)
        assert attempt.device_seconds == number
