"""Rewards in a process that can be killed."""
