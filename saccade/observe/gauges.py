"""A run's figures as gauges: for Ray's metrics, and at a Prometheus endpoint of the driver if that is wanted.

Gauges.set ─▶ ray.util.metrics    `ray_saccade_*` on every node's metrics port
           ─▶ prometheus_client   `saccade_*` at cluster.metrics_port

All have the label `run`, the name of the output folder, so that the runs of a cluster can be told apart.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client import Gauge as PrometheusGauge
from ray.util.metrics import Gauge as RayGauge

GAUGES = {
    "step": "updates done",
    "steps": "updates that the run is to do",
    "reward": "mean reward of the step's scored completions",
    "loss": "the policy update's loss",
    "learning_rate": "of the last optimizer step",
    "samples_per_second": "completions trained per second of wall time",
    "tokens_per_second": "completion tokens trained per second of wall time",
    "rollout_seconds": "seconds the driver waited for the step's groups",
    "learn_seconds": "seconds of the learner's update",
    "sync_seconds": "seconds from pause to resume of the weight synchronisation",
    "driver_seconds": "seconds of the step in which nothing but the driver worked",
    "staleness": "largest lag in policy versions of a trained token",
    "kl": "mean KL to the reference policy, as estimated",
    "mismatch_mean": "mean |log-probability difference| between engine and learner",
    "mismatch_max": "largest |log-probability difference| between engine and learner",
    "mismatch_kl": "mean k3 KL of the engine's policy to the learner's",
    "effective_sample_size": "of the importance weights between engine and learner, as a share of the tokens",
    "clip_fraction": "share of tokens whose ratio was clipped",
    "invalid_share": "share of completions without a score",
    "truncated_share": "share of completions cut off at the length limit",
    "groups_without_signal": "groups of equal rewards or with fewer than two scores",
    "completion_length": "mean completion length in tokens",
    "grad_norm": "gradient norm before clipping",
    "steps_not_taken": "optimizer steps of the last update that were not taken, as the gradient was not finite",
    "entropy": "mean token entropy",
}
LABELLED = {
    "reward_score": ("mean score of a reward", ("reward",)),
    "reward_seconds": ("mean seconds that a reward took for one group", ("reward",)),
    "evaluation": ("a figure of the last evaluation: its reward, or the score of one", ("file", "group", "figure")),
}


class Gauges:
    """Every exporter sees the same numbers."""

    def __init__(self, run: str, port: int = 0) -> None:
        """Raises OSError where `port` cannot be served; 0: only Ray has the figures."""
        self._run = run
        registry = CollectorRegistry()
        tables = {**{name: (text, ()) for name, text in GAUGES.items()}, **LABELLED}
        self._gauges: dict[str, tuple[RayGauge, PrometheusGauge]] = {}
        for name, (text, labels) in tables.items():
            keys = ("run", *labels)
            ray_gauge = RayGauge(f"saccade_{name}", description=text, tag_keys=keys)
            self._gauges[name] = ray_gauge, PrometheusGauge(f"saccade_{name}", text, keys, registry=registry)
        self._server = start_http_server(port, registry=registry)[0] if port else None

    def set(self, name: str, value: float, **labels: str) -> None:
        ray_gauge, prometheus_gauge = self._gauges[name]
        ray_gauge.set(float(value), tags={"run": self._run, **labels})
        prometheus_gauge.labels(run=self._run, **labels).set(float(value))

    def close(self) -> None:
        """Give the port back."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
