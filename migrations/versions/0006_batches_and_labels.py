"""Batches, families, titles, stars, notes, tags, tempo and key, and the format of each file.

Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

from dgx_music.storage.schema import Id, JsonObject, LongText, ShortText, UtcDateTime, now

revision = "0006"
down_revision = "0005"

COLUMNS = {
    "audio_format": ShortText,
    "take": sa.Integer,
    "parent_id": Id,
    "bpm": sa.Double,
    "musical_key": ShortText,
    "title": ShortText,
    "notes": LongText,
    "tags": JsonObject,
    "search_text": LongText,
}
INDEXES = [
    ("starred", ["created_at", "id"], "is_starred"),
    ("batch", ["batch_id", "created_at", "id"], "batch_id IS NOT NULL"),
    ("parent_id", ["parent_id"], "parent_id IS NOT NULL"),
    ("bpm", ["bpm"], "bpm IS NOT NULL"),
    ("musical_key", ["musical_key", "created_at", "id"], "musical_key IS NOT NULL"),
]

# Each of them costs nothing for a row without tags and words.
SQLITE = """
CREATE TRIGGER tags_of_added_generation AFTER INSERT ON generations WHEN NEW.tags IS NOT NULL BEGIN
  INSERT INTO tags (generation_id, name) SELECT DISTINCT NEW.id, value FROM json_each(NEW.tags);
END;

CREATE TRIGGER tags_of_changed_generation AFTER UPDATE OF tags ON generations BEGIN
  DELETE FROM tags WHERE generation_id = NEW.id;
  INSERT INTO tags (generation_id, name)
  SELECT DISTINCT NEW.id, value FROM json_each(coalesce(NEW.tags, '[]'));
END;

CREATE TABLE generations_words (id INTEGER PRIMARY KEY, generation_id VARCHAR(36) NOT NULL UNIQUE);

CREATE VIRTUAL TABLE generations_search USING fts5(search_text, tokenize='porter ascii');

CREATE TRIGGER search_added_generation AFTER INSERT ON generations WHEN NEW.search_text IS NOT NULL BEGIN
  INSERT INTO generations_words (generation_id) VALUES (NEW.id);
  INSERT INTO generations_search (rowid, search_text)
  SELECT id, NEW.search_text FROM generations_words WHERE generation_id = NEW.id;
END;

CREATE TRIGGER search_changed_generation AFTER UPDATE OF search_text ON generations BEGIN
  DELETE FROM generations_search
  WHERE rowid = (SELECT id FROM generations_words WHERE generation_id = NEW.id);
  DELETE FROM generations_words WHERE generation_id = NEW.id;
  INSERT INTO generations_words (generation_id) SELECT NEW.id WHERE NEW.search_text IS NOT NULL;
  INSERT INTO generations_search (rowid, search_text)
  SELECT id, NEW.search_text FROM generations_words WHERE generation_id = NEW.id;
END;

CREATE TRIGGER search_deleted_generation AFTER DELETE ON generations WHEN OLD.search_text IS NOT NULL BEGIN
  DELETE FROM generations_search
  WHERE rowid = (SELECT id FROM generations_words WHERE generation_id = OLD.id);
  DELETE FROM generations_words WHERE generation_id = OLD.id;
END
"""

SQLITE_DOWN = """
DROP TRIGGER search_deleted_generation;
DROP TRIGGER search_changed_generation;
DROP TRIGGER search_added_generation;
DROP TABLE generations_search;
DROP TABLE generations_words;
DROP TRIGGER tags_of_changed_generation;
DROP TRIGGER tags_of_added_generation
"""

# The function sets its own search path, because that of a restore is empty.
POSTGRESQL = """
CREATE FUNCTION dgx_music_generation_tagged() RETURNS trigger LANGUAGE plpgsql SET search_path = @schema AS $$
BEGIN
  DELETE FROM tags WHERE generation_id = NEW.id;
  INSERT INTO tags (generation_id, name)
  SELECT DISTINCT NEW.id, name FROM jsonb_array_elements_text(coalesce(NEW.tags, '[]'::jsonb)) AS name;
  RETURN NULL;
END $$;

CREATE TRIGGER dgx_music_tags_added AFTER INSERT ON generations FOR EACH ROW
WHEN (NEW.tags IS NOT NULL) EXECUTE FUNCTION dgx_music_generation_tagged();

CREATE TRIGGER dgx_music_tags_changed AFTER UPDATE OF tags ON generations FOR EACH ROW
WHEN (OLD.tags IS DISTINCT FROM NEW.tags) EXECUTE FUNCTION dgx_music_generation_tagged();

CREATE INDEX ix_generations_text_search ON generations
USING gin (to_tsvector('english'::regconfig, search_text)) WHERE search_text IS NOT NULL
"""

POSTGRESQL_DOWN = """
DROP INDEX ix_generations_text_search;
DROP TRIGGER dgx_music_tags_changed ON generations;
DROP TRIGGER dgx_music_tags_added ON generations;
DROP FUNCTION dgx_music_generation_tagged()
"""


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    op.create_table(
        "batches",
        sa.Column("id", Id, nullable=False),
        sa.Column("name", ShortText),
        sa.Column("created_at", UtcDateTime, server_default=now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    # As text: Alembic would add the constraint in a second step, which on SQLite copies the table.
    op.execute(
        "ALTER TABLE generations ADD COLUMN batch_id VARCHAR(36)"
        " CONSTRAINT fk_generations_batch_id REFERENCES batches (id)"
    )
    for name, kind in COLUMNS.items():
        op.add_column("generations", sa.Column(name, kind))
    is_starred = sa.Column("is_starred", sa.Boolean, server_default=sa.false(), nullable=False)
    op.add_column("generations", is_starred)
    for name, columns, condition in INDEXES:
        where = sa.text(condition)
        op.create_index(
            f"ix_generations_{name}",
            "generations",
            columns,
            sqlite_where=where,
            postgresql_where=where,
        )
    op.create_table(
        "tags",
        sa.Column("generation_id", Id, nullable=False),
        sa.Column("name", ShortText, nullable=False),
        sa.ForeignKeyConstraint(
            ["generation_id"],
            ["generations.id"],
            name=op.f("fk_tags_generation_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("generation_id", "name", name=op.f("pk_tags")),
    )
    op.create_index("ix_tags_name", "tags", ["name", "generation_id"])
    execute_each(SQLITE if is_sqlite else POSTGRESQL.replace("@schema", own_schema()))


def downgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    execute_each(SQLITE_DOWN if is_sqlite else POSTGRESQL_DOWN)
    op.drop_table("tags")
    for name, _, _ in reversed(INDEXES):
        op.drop_index(f"ix_generations_{name}", "generations")
    for name in ("is_starred", *reversed(COLUMNS)):
        op.drop_column("generations", name)
    op.drop_column("generations", "batch_id")
    op.drop_table("batches")


def own_schema() -> str:
    """Return the schema of the tables, as SQL."""
    return op.get_bind().exec_driver_sql("SELECT quote_ident(current_schema())").scalar_one()


def execute_each(script: str) -> None:
    """Execute the statements, or lines if there is no empty line between them."""
    separator = ";\n\n" if ";\n\n" in script else ";\n"
    for statement in script.strip().split(separator):
        op.get_bind().exec_driver_sql(statement)
