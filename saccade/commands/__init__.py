"""Commands besides `train` and `eval`."""
