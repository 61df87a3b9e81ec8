"""The result of a run; and whether a resume has anything left to do, which the folder tells before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from saccade import checkpoints
from saccade.config.run_config import RunConfig
from saccade.fleet.run_folder import in_use
from saccade.observe.metrics import MODEL, read_metrics
from saccade.pipeline.evaluate import Results


@dataclass(frozen=True)
class RunResult:
    """`train` returns this."""

    output_dir: Path
    model_dir: Path | None
    """The trained model in Hugging Face format; None if the run was interrupted."""
    steps: int
    """Updates that were done, over all resumes."""
    evaluations: Mapping[int, Results]
    """Results by step, over all resumes."""
    interrupted: bool = False


def finished(config: RunConfig) -> RunResult | None:
    """Return the result of a run that has nothing left to do: all steps are done, the last evaluation too if there is
    one, and the model is saved. None otherwise."""
    directory = Path(config.output_dir).absolute()
    done = max(checkpoints.found(directory / "checkpoints"), default=-1)
    if done < config.steps or in_use(directory) or not (directory / "model").is_dir():
        return None
    evaluations = {e["step"]: e["results"] for e in read_metrics(directory, "evaluation")}
    unevaluated = bool(config.data.eval) and done == config.steps and done not in evaluations
    if unevaluated or all(entry["step"] != done for entry in read_metrics(directory, MODEL)):
        return None
    return RunResult(directory, directory / "model", done, evaluations)
