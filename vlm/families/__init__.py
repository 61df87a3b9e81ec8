"""One adapter for each model family."""
