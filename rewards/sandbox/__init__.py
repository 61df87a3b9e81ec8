"""Run the policy's programs where they can do no harm."""
