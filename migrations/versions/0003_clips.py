"""Clips of a request: the audio to continue, and the melody to follow.

Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import HashText, UtcDateTime, now

revision = "0003"
down_revision = "0002"

COLUMNS = ("continuation_sha256", "melody_sha256")


def upgrade() -> None:
    op.create_table(
        "clips",
        sa.Column("sha256", HashText, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("duration_seconds", sa.Double, nullable=False),
        sa.Column("created_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("last_used_at", UtcDateTime, server_default=now(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_clips")),
    )
    if op.get_context().dialect.name == "postgresql":  # FLAC cannot be compressed further
        op.execute("ALTER TABLE clips ALTER COLUMN data SET STORAGE EXTERNAL")
    for name in COLUMNS:
        # As text: Alembic would add the constraint in a second step, which on SQLite copies the table.
        op.execute(
            f"ALTER TABLE generations ADD COLUMN {name} VARCHAR(64)"
            f" CONSTRAINT fk_generations_{name} REFERENCES clips (sha256)"
        )
        is_given = sa.text(f"{name} IS NOT NULL")
        op.create_index(
            f"ix_generations_{name}",
            "generations",
            [name],
            sqlite_where=is_given,
            postgresql_where=is_given,
        )


def downgrade() -> None:
    for name in reversed(COLUMNS):
        op.drop_index(f"ix_generations_{name}", "generations")
        op.drop_column("generations", name)
    op.drop_table("clips")
