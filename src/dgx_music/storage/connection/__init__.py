"""Connections to SQLite and PostgreSQL: URLs, sessions, replicas, waking up. Knows no table."""
