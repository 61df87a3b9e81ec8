"""Everything a run shows: metrics, the terminal, and where the time goes."""
