"""States of workers: loading and ended. A finished row has no cancel request any more.

Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import LongText, StatusText

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column(
        "workers", sa.Column("state", StatusText, server_default="serving", nullable=False)
    )
    # As text: Alembic would add the constraint in a second step, which on SQLite copies the table.
    kind = (
        "TIMESTAMP WITH TIME ZONE" if op.get_context().dialect.name == "postgresql" else "DATETIME"
    )
    op.execute(
        f"ALTER TABLE workers ADD COLUMN ended_at {kind}"
        " CONSTRAINT ck_workers_ended_has_time CHECK ((state = 'ended') = (ended_at IS NOT NULL))"
    )
    op.add_column("workers", sa.Column("end_reason", LongText))
    # Rows that were finished by hand after a cancel request: the status stays, the flag goes.
    op.execute(
        "UPDATE generations SET cancel_requested = false WHERE cancel_requested AND status IN ('completed', 'failed')"
    )


def downgrade() -> None:
    # an older version would think that they are silent
    op.execute("DELETE FROM workers WHERE state = 'ended'")
    op.drop_column("workers", "end_reason")
    op.drop_column("workers", "ended_at")
    op.drop_column("workers", "state")
