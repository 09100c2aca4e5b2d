"""Waveforms of new rows are short texts; the lists of older rows stay, and are read as well.

Revises: 0009
"""

import json

import sqlalchemy as sa
from alembic import op

from dgx_music.waveform import PREFIX, Waveform

revision = "0010"
down_revision = "0009"

ROWS_AT_ONCE = 1_000

SQLITE_TEXTS = """
SELECT id, json_extract(metadata, '$.audio.waveform') AS waveform FROM generations
WHERE id > :last AND json_extract(metadata, '$.audio.waveform') LIKE :text ORDER BY id LIMIT :count
"""
SQLITE_AS_LIST = """
UPDATE generations SET metadata = json_set(metadata, '$.audio.waveform', json(:peaks)) WHERE id = :id
"""
POSTGRESQL_TEXTS = """
SELECT id, metadata #>> '{audio,waveform}' AS waveform FROM generations
WHERE id > :last AND metadata #>> '{audio,waveform}' LIKE :text ORDER BY id LIMIT :count
"""
POSTGRESQL_AS_LIST = """
UPDATE generations SET metadata = jsonb_set(metadata, '{audio,waveform}', CAST(:peaks AS jsonb))
WHERE id = :id
"""


def upgrade() -> None:
    """Change nothing: the new number tells workers and programs that cannot read the texts."""


def downgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    texts = sa.text(SQLITE_TEXTS if is_sqlite else POSTGRESQL_TEXTS)
    as_list = sa.text(SQLITE_AS_LIST if is_sqlite else POSTGRESQL_AS_LIST)
    last, some = "", {"text": f"{PREFIX}%", "count": ROWS_AT_ONCE}
    while rows := op.get_bind().execute(texts, {"last": last, **some}).all():
        op.get_bind().execute(
            as_list,
            [{"id": row.id, "peaks": json.dumps([*Waveform(row.waveform)])} for row in rows],
        )
        last = rows[-1].id
