"""Tokens of the web API.

Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import HashText, ShortText, StatusText, UtcDateTime, now

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("name", ShortText, nullable=False),
        sa.Column("sha256", HashText, nullable=False),
        sa.Column("role", StatusText, nullable=False),
        sa.Column("tenant", ShortText),
        sa.Column("created_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("expires_at", UtcDateTime),
        sa.Column("revoked_at", UtcDateTime),
        sa.Column("last_used_at", UtcDateTime),
        sa.CheckConstraint("role IN ('read', 'enqueue', 'operate')", name=op.f("ck_tokens_role")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tokens")),
        sa.UniqueConstraint("sha256", name=op.f("uq_tokens_sha256")),
    )


def downgrade() -> None:
    op.drop_table("tokens")
