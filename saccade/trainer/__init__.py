"""Runs from Python objects: `saccade.Trainer`, for who brings what TRL's GRPOTrainer takes."""
