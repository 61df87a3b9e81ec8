"""Which group is generated, scored and trained, and when."""
