"""Run rewards in a process that can be killed."""
