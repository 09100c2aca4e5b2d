"""Fewer index entries: none for running rows by worker, and for ends only those that are known.

The index of statuses finds the running rows as well. The index of what is due gets a condition that
claims do not have, since they would have to sort what they find there.

Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

PENDING = sa.text("status = 'pending'")
BY_TIME = sa.text("status = 'pending' AND attempt >= 0")
PROCESSING = sa.text("status = 'processing'")
FINISHED = sa.text("completed_at IS NOT NULL")


def upgrade() -> None:
    op.drop_index("ix_generations_processing", "generations")
    op.drop_index("ix_generations_completed_at", "generations")
    create_index("completed_at", ["completed_at"], FINISHED)
    op.drop_index("ix_generations_due", "generations")
    create_index("due", ["model_name", "run_at"], BY_TIME)


def downgrade() -> None:
    op.drop_index("ix_generations_due", "generations")
    create_index("due", ["model_name", "run_at"], PENDING)
    op.drop_index("ix_generations_completed_at", "generations")
    create_index("completed_at", ["completed_at"])
    create_index("processing", ["worker_id"], PROCESSING)


def create_index(name: str, columns: list[str], where: sa.TextClause | None = None) -> None:
    op.create_index(
        f"ix_generations_{name}",
        "generations",
        columns,
        sqlite_where=where,
        postgresql_where=where,
    )
