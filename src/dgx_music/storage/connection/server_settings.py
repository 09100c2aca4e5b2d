"""The settings that we need in a PostgreSQL session; a role or a database may have others.

Each connection sets them in its first message. A pooler in transaction mode does not keep them:
then each transaction begins by setting them, for itself. One more statement changes settings that
depend on what the server has.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, event

from dgx_music.storage.connection.revision import VERSION_TABLE

READABLE = {
    "DateStyle": "ISO",  # psycopg reads no other
    "TimeZone": "UTC",
    "extra_float_digits": "1",  # less would round durations
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
    "lock_timeout": "0",  # the timeout of the statement is enough
}
"""Settings that every role may change."""

_OUR_SCHEMA = f"""
SELECT min(quote_ident(nspname)) AS name
FROM pg_catalog.pg_class JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
WHERE relname = '{VERSION_TABLE}' AND relkind = 'r' AND has_schema_privilege(pg_namespace.oid, 'USAGE')
HAVING count(*) = 1
"""  # noqa: S608 - a constant

_ASKED = f"""
SELECT set_config('synchronous_commit', 'on', {{is_local}}) WHERE current_setting('synchronous_commit') = 'off'
UNION ALL SELECT set_config('session_replication_role', 'origin', {{is_local}})
  WHERE current_setting('session_replication_role') = 'replica'
UNION ALL SELECT set_config('transaction_timeout', '0', {{is_local}})
  WHERE current_setting('transaction_timeout', true) <> '0'
UNION ALL SELECT set_config('search_path', concat_ws(', ', coalesce(visible.name, alone.name, 'public'),
  nullif(nullif(current_setting('search_path'), ''), '""')), {{is_local}})
  FROM (SELECT min(quote_ident(nspname)) AS name FROM pg_catalog.pg_class
        JOIN pg_catalog.pg_namespace ON pg_namespace.oid = relnamespace
        WHERE pg_class.oid = to_regclass('{VERSION_TABLE}')) AS visible, (SELECT min(name) AS name FROM ({_OUR_SCHEMA})
        AS found) AS alone
  WHERE coalesce(visible.name, alone.name) IS NOT NULL OR current_schema() IS NULL
"""  # noqa: S608 - a constant
"""Makes sure that acknowledged rows are on the server's disk; that triggers fire (a role that must
not change that gets the server's error, since its statistics would be silently wrong); that only we
end a transaction; and that any search path finds our tables, before others of the same names, in
the schema in which they were created."""

SET_UP = _ASKED.format(is_local="false")


def say_in_each_transaction(engine: Engine) -> None:
    """Have each transaction set the settings first, since a pooler does not keep them."""
    said = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in READABLE.items())

    def begin(connection: Connection) -> None:
        cursor: Any = connection.connection.cursor()
        for statement in (f"SELECT {said}", _ASKED.format(is_local="true")):
            cursor.execute(statement)
            cursor.fetchall()
        cursor.close()

    event.listen(engine, "begin", begin)
