"""The parts of `bench.gpu`, one module each. `run(setting)` returns figures, and `checks` that must hold."""
