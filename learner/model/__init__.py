"""The policy: loaded, attending in packed rows, giving log-probabilities."""
