"""Read data files and turn their rows into prompts."""
