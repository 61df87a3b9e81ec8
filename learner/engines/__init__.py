"""Training engines behind one Protocol, their optimizer, checkpoints and exports."""
