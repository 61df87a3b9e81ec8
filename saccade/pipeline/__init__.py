"""The pipeline decides which group is generated, scored and trained, and when."""
