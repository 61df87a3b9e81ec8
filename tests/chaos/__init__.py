"""Processes of a run are killed and stopped at random moments, and every prompt is trained exactly once all the same.

python -m tests.chaos --kills 200 --engine simulated --seed 0
"""
