"""Export a run's metrics as gauges: to Ray's metrics and, if configured, to a Prometheus endpoint of the driver.

Gauges.set ─▶ ray.util.metrics    `ray_saccade_*` on every node's metrics port
           ─▶ prometheus_client   `saccade_*` at cluster.metrics_port

All gauges have the label `run`, the name of the output folder, which tells the runs of a cluster apart.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client import Gauge as PrometheusGauge
from ray.util.metrics import Gauge as RayGauge

GAUGES = {
    "step": "updates done",
    "steps": "updates that the run will do",
    "reward": "mean reward of the step's scored completions",
    "loss": "loss of the policy update",
    "learning_rate": "learning rate of the last optimizer step",
    "samples_per_second": "completions trained per second of wall time",
    "tokens_per_second": "completion tokens trained per second of wall time",
    "rollout_seconds": "seconds the driver waited for the step's groups",
    "learn_seconds": "seconds of the learner's update",
    "sync_seconds": "seconds of the weight sync, from pause to resume",
    "driver_seconds": "seconds of the step in which only the driver worked",
    "staleness": "largest lag in policy versions of a trained token",
    "kl": "estimated mean KL to the reference policy",
    "mismatch_mean": "mean |log-probability difference| between engine and learner",
    "mismatch_max": "largest |log-probability difference| between engine and learner",
    "mismatch_kl": "mean KL (k3) of the engine's policy to the learner's",
    "effective_sample_size": "effective sample size of the weights between engine and learner, as a share of tokens",
    "clip_fraction": "share of tokens whose ratio was clipped",
    "invalid_share": "share of completions without a score",
    "truncated_share": "share of completions cut off at the length limit",
    "groups_without_signal": "groups whose rewards are all equal, or with fewer than two scores",
    "completion_length": "mean completion length in tokens",
    "grad_norm": "gradient norm before clipping",
    "steps_not_taken": "optimizer steps of the last update that were not taken because the gradient was not finite",
    "entropy": "mean token entropy",
}
LABELLED = {
    "reward_score": ("mean score of a reward", ("reward",)),
    "reward_seconds": ("mean seconds of a reward per group", ("reward",)),
    "evaluation": (
        "a figure of the last evaluation: the total reward, or the score of one reward",
        ("file", "group", "figure"),
    ),
}


class Gauges:
    """Sets each gauge in all exporters, so that they show the same numbers."""

    def __init__(self, run: str, port: int = 0) -> None:
        """Serve `port`; with 0, only Ray gets the metrics. Raises OSError if the port cannot be used."""
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
        """Release the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
