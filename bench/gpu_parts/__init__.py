"""The parts of `bench.gpu`, a module each: `run(setting)` returns figures, and `checks` that must hold."""
