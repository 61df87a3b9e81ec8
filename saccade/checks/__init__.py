"""Checks of the model, the data and the rewards, for `resolve` and for the commands."""
