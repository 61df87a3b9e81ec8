"""`saccade demo`: a task that is made, learned and shown within minutes."""
