"""Joining or starting Ray, and what ends with it.

local   reaper ─▶ ray.init ─▶ head watched ─▶ ... ─▶ ray.shutdown ─▶ the reaper ends what is left, also when the
                                                     driver is killed
joined              ray.init ─▶ head watched ─▶ ... ─▶ ray.shutdown; the cluster ends the job's actors
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from saccade.config.demands import local_resources
from saccade.config.run_config import RunConfig
from saccade.config.saved_paths import job_environment
from saccade.errors import RunError
from saccade.fleet import reaper
from saccade.fleet.head import HeadWatch
from saccade.observe.display import Display
from vlm.import_path import NAMES, hiding

PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")
"""Environment of the driver that its actors need too. Nothing prints it: a gated model's HF_TOKEN is a secret."""

HOOK_KEY, HOOK = "worker_process_setup_hook", "saccade.keep_names"
"""Ray calls this function in every worker before it imports anything of a run."""


@contextmanager
def connect(config: RunConfig, address: str | None, display: Display) -> Iterator[HeadWatch]:
    """Join the cluster at `address` (or RAY_ADDRESS, which a submitted job has); start a local Ray otherwise.

    A Ray that was started here ends here, with everything that it started, also when this process is killed; a joined
    one only loses this run's actors. Yields the watch over Ray's head service."""
    if ray.is_initialized():  # a notebook, a test: the caller's Ray, which stays
        _check_names()
        with _watched(display, local=False) as head:
            yield head
        return
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of answers that nobody waits for, of who was killed
    target = address or os.environ.get("RAY_ADDRESS")
    reaping = None if target else reaper.start(Path(ray.__file__).parent)
    try:
        _init(config, target)
        display.phase(f"Ray at {target}" if target else "local Ray started")
        with _watched(display, local=not target) as head:
            try:
                yield head
            finally:
                if not head.lost:
                    head.stop()  # what it would see next is how Ray is shut down
                ray.shutdown()
    finally:
        if reaping is not None:
            reaper.finish(reaping)


def _watched(display: Display, *, local: bool) -> HeadWatch:
    return HeadWatch(ray.get_runtime_context().gcs_address, display, local=local)


def _check_names() -> None:
    """Raises RunError where workers of the caller's Ray would import a user's folder in place of a package of ours."""
    if (folders := hiding()) and ray.get_runtime_context().runtime_env.get(HOOK_KEY) != HOOK:
        raise RunError(
            f"{', '.join(folders)}: holds a folder or file named like a package of saccade ({', '.join(NAMES)}), and "
            f"Ray's workers would import that. Do not call ray.init before: a run starts Ray itself. Or call it with "
            f"runtime_env={{{HOOK_KEY!r}: {HOOK!r}}}"
        )


def _init(config: RunConfig, target: str | None) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray refuses a variable that the submitted job's own environment names already, even with the same value.
    given = job_environment().get("env_vars", {})
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ and name not in given}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if hiding():  # Ray runs the hook before it knows the driver's path: it needs saccade to be installed
        runtime_env[HOOK_KEY] = HOOK
    try:
        if target:
            ray.init(address=target, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)
        else:
            # Logical CPUs only: the configuration says how many threads compute.
            offered = local_resources(config)
            cpus = max(os.cpu_count() or 1, int(offered.pop("CPU")))
            ray.init(
                address="local",
                num_cpus=cpus,
                resources=offered,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=runtime_env,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"cannot reach Ray at {target or 'this machine'}: {error}") from error
