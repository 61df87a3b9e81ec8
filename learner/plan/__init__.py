"""Memory and operations of a step, from the shape of a model alone."""
