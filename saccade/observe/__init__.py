"""What a run shows: figures, the terminal, where the time goes."""
