"""One file for each reward, and helpers that several of them share."""
