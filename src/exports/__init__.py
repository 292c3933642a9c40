"""Rows as files: JSON lines, CSV, Parquet. Knows no GraphQL and no database."""
