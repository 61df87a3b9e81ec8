"""The math of an update: advantages, losses, divergences. Pure functions."""
