"""The fleet: Ray, placement, actors, who serves, and what becomes of them."""
