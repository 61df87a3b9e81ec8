"""The cache of frozen towers: features, or tower outputs."""
