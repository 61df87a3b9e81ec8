"""One file for each reward, and what two of them share."""
