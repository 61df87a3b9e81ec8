"""What an answer says: a grammar, read once for every reward that compares."""
