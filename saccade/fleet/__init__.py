"""Who serves and where: Ray, placement, actors, and what becomes of them."""
