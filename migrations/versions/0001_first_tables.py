"""Prompts, generations, attempts, workers.

Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import (
    HashText,
    Id,
    JsonObject,
    ShortText,
    StatusText,
    UtcDateTime,
    now,
)

revision = "0001"
down_revision = None

PENDING = sa.text("status = 'pending'")
PROCESSING = sa.text("status = 'processing'")
FINISHED = sa.text("completed_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "prompts",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("text_hash", HashText, nullable=False),
        sa.Column("used_count", sa.Integer, server_default=sa.text("1"), nullable=False),
        sa.Column("first_used_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("last_used_at", UtcDateTime, server_default=now(), nullable=False),
        sa.CheckConstraint("used_count >= 1", name=op.f("ck_prompts_used_count")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompts")),
        sa.UniqueConstraint("text_hash", name=op.f("uq_prompts_text_hash")),
    )
    op.create_index("ix_prompts_used_count", "prompts", ["used_count"])

    op.create_table(
        "generations",
        sa.Column("id", Id, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("prompt_id", sa.Integer),
        sa.Column("model_name", ShortText, nullable=False),
        sa.Column("duration_seconds", sa.Double, nullable=False),
        sa.Column("sample_rate", sa.Integer, nullable=False),
        sa.Column("channels", sa.Integer, nullable=False),
        sa.Column("sampling", JsonObject),
        sa.Column("priority", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("max_attempts", sa.Integer, server_default=sa.text("10"), nullable=False),
        sa.Column("idempotency_key", ShortText),
        sa.Column("request_hash", HashText),
        sa.Column("created_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("status", StatusText, server_default="pending", nullable=False),
        sa.Column("run_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("attempt", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("failures", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("worker_id", ShortText),
        sa.Column("started_at", UtcDateTime),
        sa.Column("lease_expires_at", UtcDateTime),
        sa.Column("progress", sa.Double, server_default=sa.text("0"), nullable=False),
        sa.Column("cancel_requested", sa.Boolean, server_default=sa.false(), nullable=False),
        sa.Column("completed_at", UtcDateTime),
        sa.Column("model_version", ShortText),
        sa.Column("file_path", sa.Text),
        sa.Column("file_size_bytes", sa.BigInteger),
        sa.Column("sha256", HashText),
        sa.Column("generation_time_seconds", sa.Double),
        sa.Column("error_message", sa.Text),
        sa.Column("metadata", JsonObject),
        sa.CheckConstraint(
            "status IN ('pending', 'processing', 'completed', 'failed', 'cancelled')",
            name=op.f("ck_generations_status"),
        ),
        sa.CheckConstraint(
            "(status IN ('completed', 'failed', 'cancelled')) = (completed_at IS NOT NULL)",
            name=op.f("ck_generations_finished_has_time"),
        ),
        sa.CheckConstraint(
            "(worker_id IS NULL) = (lease_expires_at IS NULL)",
            name=op.f("ck_generations_claim_has_lease"),
        ),
        sa.CheckConstraint(
            "worker_id IS NULL OR status = 'processing'",
            name=op.f("ck_generations_only_processing_is_held"),
        ),
        sa.CheckConstraint(
            "duration_seconds > 0 AND sample_rate > 0 AND channels > 0",
            name=op.f("ck_generations_audio_shape"),
        ),
        sa.CheckConstraint(
            "attempt >= 0 AND failures >= 0 AND max_attempts >= 1",
            name=op.f("ck_generations_counts"),
        ),
        sa.CheckConstraint("progress >= 0 AND progress <= 1", name=op.f("ck_generations_progress")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_generations")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_generations_idempotency_key")),
        sa.ForeignKeyConstraint(
            ["prompt_id"],
            ["prompts.id"],
            name=op.f("fk_generations_prompt_id"),
            ondelete="SET NULL",
        ),
        postgresql_with={"fillfactor": 80},
    )
    op.create_index(
        "ix_generations_claim",
        "generations",
        ["model_name", sa.text("priority DESC"), "run_at", "id"],
        sqlite_where=PENDING,
        postgresql_where=PENDING,
    )
    op.create_index(
        "ix_generations_processing",
        "generations",
        ["worker_id"],
        sqlite_where=PROCESSING,
        postgresql_where=PROCESSING,
    )
    op.create_index(
        "ix_generations_status_created_at", "generations", ["status", "created_at", "id"]
    )
    op.create_index("ix_generations_created_at", "generations", ["created_at", "id"])
    op.create_index(
        "ix_generations_model_name_created_at", "generations", ["model_name", "created_at"]
    )
    op.create_index("ix_generations_completed_at", "generations", ["completed_at"])
    op.create_index(
        "ix_generations_due",
        "generations",
        ["model_name", "run_at"],
        sqlite_where=PENDING,
        postgresql_where=PENDING,
    )
    op.create_index(
        "ix_generations_finished",
        "generations",
        ["status", "completed_at"],
        sqlite_where=FINISHED,
        postgresql_where=FINISHED,
    )
    op.create_index("ix_generations_prompt_id", "generations", ["prompt_id"])

    op.create_table(
        "attempts",
        sa.Column("generation_id", Id, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("worker_id", ShortText, nullable=False),
        sa.Column("started_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("finished_at", UtcDateTime),
        sa.Column("outcome", StatusText),
        sa.Column("error_message", sa.Text),
        sa.Column("device_seconds", sa.Double),
        sa.CheckConstraint(
            "outcome IN ('completed', 'failed', 'released', 'cancelled', 'lost')",
            name=op.f("ck_attempts_outcome"),
        ),
        sa.CheckConstraint(
            "(outcome IS NULL) = (finished_at IS NULL)",
            name=op.f("ck_attempts_finished_has_outcome"),
        ),
        sa.PrimaryKeyConstraint("generation_id", "attempt", name=op.f("pk_attempts")),
        sa.ForeignKeyConstraint(
            ["generation_id"],
            ["generations.id"],
            name=op.f("fk_attempts_generation_id"),
            ondelete="CASCADE",
        ),
    )

    op.create_table(
        "workers",
        sa.Column("id", ShortText, nullable=False),
        sa.Column("host", ShortText, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("model_name", ShortText, nullable=False),
        sa.Column("device", ShortText, nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("running_count", sa.Integer, server_default=sa.text("0"), nullable=False),
        sa.Column("started_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("heartbeat_at", UtcDateTime, server_default=now(), nullable=False),
        sa.Column("lease_seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )


def downgrade() -> None:
    op.drop_table("workers")
    op.drop_table("attempts")
    op.drop_table("generations")
    op.drop_table("prompts")
