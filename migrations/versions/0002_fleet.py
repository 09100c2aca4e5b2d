"""Many workers: tenants, priorities, pauses, speeds, tallies, search, notifications.

Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import (
    JsonObject,
    LongText,
    ShortText,
    StatusText,
    UtcDateTime,
    claim_order,
    now,
)
from dgx_music.storage.words import search_text

revision = "0002"
down_revision = "0001"

PENDING = sa.text("status = 'pending'")
TENANT = sa.text("tenant <> ''")
CLAIM_ORDER = claim_order(sa.column("run_at"), sa.column("priority"))
PROMPTS_AT_ONCE = 1_000

# The triggers. A tally is one more row, never an update: with a shared counter everybody would wait.
SQLITE = """
CREATE TRIGGER tally_added_generation AFTER INSERT ON generations WHEN NEW.completed_at IS NOT NULL BEGIN
  INSERT INTO tallies (name, delta) VALUES (NEW.status, 1);
END;

CREATE TRIGGER tally_moved_generation AFTER UPDATE OF status, completed_at ON generations
WHEN OLD.status <> NEW.status OR (OLD.completed_at IS NULL) <> (NEW.completed_at IS NULL) BEGIN
  INSERT INTO tallies (name, delta) SELECT OLD.status, -1 WHERE OLD.completed_at IS NOT NULL;
  INSERT INTO tallies (name, delta) SELECT NEW.status, 1 WHERE NEW.completed_at IS NOT NULL;
END;

CREATE TRIGGER tally_deleted_generation AFTER DELETE ON generations WHEN OLD.completed_at IS NOT NULL BEGIN
  INSERT INTO tallies (name, delta) VALUES (OLD.status, -1);
END;

CREATE VIRTUAL TABLE prompts_search
USING fts5(search_text, content='prompts', content_rowid='id', tokenize='porter ascii');

INSERT INTO prompts_search (prompts_search) VALUES ('rebuild');

CREATE TRIGGER search_added_prompt AFTER INSERT ON prompts BEGIN
  INSERT INTO prompts_search (rowid, search_text) VALUES (NEW.id, NEW.search_text);
  INSERT INTO tallies (name, delta) VALUES ('prompts', 1);
END;

CREATE TRIGGER search_changed_prompt AFTER UPDATE OF search_text ON prompts BEGIN
  INSERT INTO prompts_search (prompts_search, rowid, search_text) VALUES ('delete', OLD.id, OLD.search_text);
  INSERT INTO prompts_search (rowid, search_text) VALUES (NEW.id, NEW.search_text);
END;

CREATE TRIGGER search_deleted_prompt AFTER DELETE ON prompts BEGIN
  INSERT INTO prompts_search (prompts_search, rowid, search_text) VALUES ('delete', OLD.id, OLD.search_text);
  INSERT INTO tallies (name, delta) VALUES ('prompts', -1);
END
"""

# Notifications are hints: work is due (with the model), a cancel (with the worker), an end (with the id).
# Each function sets its own search path, because that of a restore is empty.
POSTGRESQL = """
CREATE FUNCTION dgx_music_generations_added() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  INSERT INTO tallies (name, delta) SELECT status, count(*) FROM added WHERE completed_at IS NOT NULL GROUP BY status;
  PERFORM pg_notify('dgx_music_work', model_name)
  FROM (SELECT DISTINCT model_name FROM added WHERE status = 'pending') AS models;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_added AFTER INSERT ON generations REFERENCING NEW TABLE AS added
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_generations_added();

CREATE FUNCTION dgx_music_generation_moved() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
DECLARE
  is_moved boolean := OLD.status <> NEW.status OR (OLD.completed_at IS NULL) <> (NEW.completed_at IS NULL);
BEGIN
  IF is_moved AND OLD.completed_at IS NOT NULL THEN
    INSERT INTO tallies (name, delta) VALUES (OLD.status, -1);
  END IF;
  IF is_moved AND NEW.completed_at IS NOT NULL THEN
    INSERT INTO tallies (name, delta) VALUES (NEW.status, 1);
    PERFORM pg_notify('dgx_music_done', NEW.id);
  ELSIF NEW.status = 'pending' THEN
    PERFORM pg_notify('dgx_music_work', NEW.model_name);
  ELSIF NEW.cancel_requested AND NEW.worker_id IS NOT NULL THEN
    PERFORM pg_notify('dgx_music_cancel', NEW.worker_id);
  END IF;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_moved AFTER UPDATE ON generations FOR EACH ROW
WHEN (
  OLD.status <> NEW.status AND NEW.status <> 'processing'
  OR (OLD.completed_at IS NULL) <> (NEW.completed_at IS NULL)
  OR NEW.cancel_requested AND NOT OLD.cancel_requested
)
EXECUTE FUNCTION dgx_music_generation_moved();

CREATE FUNCTION dgx_music_generations_deleted() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  INSERT INTO tallies (name, delta) SELECT status, -count(*) FROM gone WHERE completed_at IS NOT NULL GROUP BY status;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_deleted AFTER DELETE ON generations REFERENCING OLD TABLE AS gone
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_generations_deleted();

CREATE FUNCTION dgx_music_prompts_counted() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  INSERT INTO tallies (name, delta)
  SELECT 'prompts', CASE TG_OP WHEN 'INSERT' THEN count(*) ELSE -count(*) END FROM changed HAVING count(*) > 0;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_added AFTER INSERT ON prompts REFERENCING NEW TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_prompts_counted();

CREATE TRIGGER dgx_music_deleted AFTER DELETE ON prompts REFERENCING OLD TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_prompts_counted();

CREATE FUNCTION dgx_music_truncated() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  INSERT INTO tallies (name, delta) SELECT name, -sum(delta) FROM tallies
  WHERE (name = 'prompts') = (TG_TABLE_NAME = 'prompts') GROUP BY name HAVING sum(delta) <> 0;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_truncated AFTER TRUNCATE ON generations
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_truncated();

CREATE TRIGGER dgx_music_truncated AFTER TRUNCATE ON prompts
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_truncated();

CREATE FUNCTION dgx_music_resumed() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  PERFORM pg_notify('dgx_music_work', '*');
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_resumed AFTER DELETE ON pauses
FOR EACH STATEMENT EXECUTE FUNCTION dgx_music_resumed();

ALTER TABLE prompts ADD COLUMN text_search tsvector GENERATED ALWAYS AS (to_tsvector('english', search_text)) STORED;

CREATE INDEX ix_prompts_text_search ON prompts USING gin (text_search);

ALTER TABLE generations SET (autovacuum_vacuum_scale_factor = 0.05)
"""

SQLITE_DOWN = """
DROP TRIGGER search_deleted_prompt;
DROP TRIGGER search_changed_prompt;
DROP TRIGGER search_added_prompt;
DROP TABLE prompts_search;
DROP TRIGGER tally_deleted_generation;
DROP TRIGGER tally_moved_generation;
DROP TRIGGER tally_added_generation
"""

POSTGRESQL_DOWN = """
ALTER TABLE generations RESET (autovacuum_vacuum_scale_factor);
ALTER TABLE prompts DROP COLUMN text_search;
DROP TRIGGER dgx_music_resumed ON pauses;
DROP TRIGGER dgx_music_truncated ON prompts;
DROP TRIGGER dgx_music_truncated ON generations;
DROP TRIGGER dgx_music_deleted ON prompts;
DROP TRIGGER dgx_music_added ON prompts;
DROP TRIGGER dgx_music_deleted ON generations;
DROP TRIGGER dgx_music_moved ON generations;
DROP TRIGGER dgx_music_added ON generations;
DROP FUNCTION dgx_music_resumed();
DROP FUNCTION dgx_music_truncated();
DROP FUNCTION dgx_music_prompts_counted();
DROP FUNCTION dgx_music_generations_deleted();
DROP FUNCTION dgx_music_generation_moved();
DROP FUNCTION dgx_music_generations_added()
"""


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    op.add_column("generations", sa.Column("tenant", ShortText, server_default="", nullable=False))
    op.drop_index("ix_generations_claim", "generations")
    create_index("claim", ["model_name", CLAIM_ORDER, "id"], PENDING)
    create_index("tenant_claim", ["model_name", "tenant", CLAIM_ORDER, "id"], PENDING)
    create_index("tenant_created_at", ["tenant", "created_at", "id"], TENANT)
    op.drop_index("ix_generations_model_name_created_at", "generations")
    create_index("model_name_created_at", ["model_name", "created_at", "id"])
    op.drop_index("ix_generations_prompt_id", "generations")
    create_index("prompt_id_created_at", ["prompt_id", "created_at", "id"])
    op.add_column("workers", sa.Column("models", JsonObject, server_default="[]", nullable=False))
    op.create_table(
        "pauses",
        sa.Column("model_name", ShortText, nullable=False),
        sa.Column("paused_at", UtcDateTime, server_default=now(), nullable=False),
        sa.PrimaryKeyConstraint("model_name", name=op.f("pk_pauses")),
    )
    op.create_table(
        "speeds",
        sa.Column("model_name", ShortText, nullable=False),
        sa.Column("device", ShortText, nullable=False),
        sa.Column("low", sa.Double, nullable=False),
        sa.Column("typical", sa.Double, nullable=False),
        sa.Column("high", sa.Double, nullable=False),
        sa.Column("measured_count", sa.Integer, nullable=False),
        sa.Column("measured_at", UtcDateTime, server_default=now(), nullable=False),
        sa.PrimaryKeyConstraint("model_name", "device", name=op.f("pk_speeds")),
    )
    op.create_table(
        "tallies",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("name", StatusText, nullable=False),
        sa.Column("delta", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tallies")),
    )
    op.execute(
        "INSERT INTO tallies (name, delta) SELECT status, count(*) FROM generations"
        " WHERE completed_at IS NOT NULL GROUP BY status"
    )
    op.execute("INSERT INTO tallies (name, delta) SELECT 'prompts', count(*) FROM prompts")
    op.add_column("prompts", sa.Column("search_text", LongText, server_default="", nullable=False))
    fill_search_text()
    if not is_sqlite:
        op.execute("ALTER TABLE workers SET (fillfactor = 50)")
    execute_each(SQLITE if is_sqlite else POSTGRESQL.replace("@schema", own_schema()))


def downgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    execute_each(SQLITE_DOWN if is_sqlite else POSTGRESQL_DOWN)
    if not is_sqlite:
        op.execute("ALTER TABLE workers RESET (fillfactor)")
    op.drop_table("tallies")
    op.drop_table("speeds")
    op.drop_table("pauses")
    op.drop_column("prompts", "search_text")
    op.drop_column("workers", "models")
    op.drop_index("ix_generations_prompt_id_created_at", "generations")
    create_index("prompt_id", ["prompt_id"])
    op.drop_index("ix_generations_model_name_created_at", "generations")
    create_index("model_name_created_at", ["model_name", "created_at"])
    op.drop_index("ix_generations_tenant_created_at", "generations")
    op.drop_index("ix_generations_tenant_claim", "generations")
    op.drop_index("ix_generations_claim", "generations")
    create_index("claim", ["model_name", sa.text("priority DESC"), "run_at", "id"], PENDING)
    op.drop_column("generations", "tenant")


def create_index(name: str, columns: list, where: sa.TextClause | None = None) -> None:
    op.create_index(
        f"ix_generations_{name}", "generations", columns, sqlite_where=where, postgresql_where=where
    )


def fill_search_text() -> None:
    """Fill in the words of each prompt, in batches, before the indexes are created."""
    chunk = sa.text("SELECT id, text FROM prompts WHERE id > :last ORDER BY id LIMIT :count")
    fill = sa.text("UPDATE prompts SET search_text = :words WHERE id = :id")
    last = 0
    while rows := op.get_bind().execute(chunk, {"last": last, "count": PROMPTS_AT_ONCE}).all():
        op.get_bind().execute(
            fill, [{"id": row.id, "words": search_text(row.text)} for row in rows]
        )
        last = rows[-1].id


def own_schema() -> str:
    """Return the schema of the tables, as SQL.

    ``FROM CURRENT`` would keep ``$user``, which is another schema for another user.
    """
    return op.get_bind().exec_driver_sql("SELECT quote_ident(current_schema())").scalar_one()


def execute_each(script: str) -> None:
    """Execute the statements between empty lines or, if there are none, the lines."""
    separator = ";\n\n" if ";\n\n" in script else ";\n"
    for statement in script.strip().split(separator):
        op.get_bind().exec_driver_sql(statement)
