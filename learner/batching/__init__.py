"""Completions to rows, rows to micro-batches."""
