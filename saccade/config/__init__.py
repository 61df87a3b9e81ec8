"""A run's configuration: its sections, what they may hold together, and what follows from them."""
