"""What is looked at before anything starts, and by commands of its own."""
