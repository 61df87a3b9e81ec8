"""What frozen towers make of media, computed once and kept."""
