"""Programs of the policy, run where they can do no harm."""
