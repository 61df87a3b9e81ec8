"""Completions become rows, and rows become micro-batches."""
