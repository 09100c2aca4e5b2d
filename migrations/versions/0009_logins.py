"""Log-ins of the page.

Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import HashText, ShortText, UtcDateTime

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "logins",
        sa.Column("sha256", HashText, nullable=False),
        sa.Column("token_name", ShortText, nullable=False),
        sa.Column("expires_at", UtcDateTime, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_logins")),
    )


def downgrade() -> None:
    op.drop_table("logins")
