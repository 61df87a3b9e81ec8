"""`saccade demo`: make a task, learn it, and show the result within minutes."""
