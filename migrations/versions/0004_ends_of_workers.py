"""Workers that load their model and workers that have ended; rows whose cancel was acknowledged are no longer failed ones.

Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import LongText, StatusText

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("workers", sa.Column("state", StatusText, server_default="serving", nullable=False))
    # As text: Alembic would add the constraint in a step of its own, for which SQLite needs a new table.
    kind = "TIMESTAMP WITH TIME ZONE" if op.get_context().dialect.name == "postgresql" else "DATETIME"
    op.execute(
        f"ALTER TABLE workers ADD COLUMN ended_at {kind}"
        " CONSTRAINT ck_workers_ended_has_time CHECK ((state = 'ended') = (ended_at IS NOT NULL))"
    )
    op.add_column("workers", sa.Column("end_reason", LongText))
    # What was finished by hand although its cancel had been acknowledged: how it ended is history, the flag says no more.
    op.execute(
        "UPDATE generations SET cancel_requested = false WHERE cancel_requested AND status IN ('completed', 'failed')"
    )


def downgrade() -> None:
    op.execute("DELETE FROM workers WHERE state = 'ended'")  # a former version would take them for silent
    op.drop_column("workers", "end_reason")
    op.drop_column("workers", "ended_at")
    op.drop_column("workers", "state")
