"""Uploads of the web API.

Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import HashText, ShortText, UtcDateTime, now

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", ShortText, nullable=False),
        sa.Column("tenant", ShortText, server_default="", nullable=False),
        sa.Column("mono_sha256", HashText, nullable=False),
        sa.Column("stereo_sha256", HashText, nullable=False),
        sa.Column("source_sha256", HashText, nullable=False),
        sa.Column("source_channels", sa.Integer(), nullable=False),
        sa.Column("duration_seconds", sa.Double(), nullable=False),
        sa.Column("created_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("expires_at", UtcDateTime, nullable=False),
        sa.ForeignKeyConstraint(
            ["mono_sha256"], ["clips.sha256"], name=op.f("fk_uploads_mono_sha256")
        ),
        sa.ForeignKeyConstraint(
            ["stereo_sha256"], ["clips.sha256"], name=op.f("fk_uploads_stereo_sha256")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_mono_sha256"), "uploads", ["mono_sha256"])
    op.create_index(op.f("ix_uploads_stereo_sha256"), "uploads", ["stereo_sha256"])
    op.create_index(op.f("ix_uploads_expires_at"), "uploads", ["expires_at"])


def downgrade() -> None:
    op.drop_table("uploads")
