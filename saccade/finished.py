"""What a run returns, and whether a resume has anything to add to it: known from its folder, before anything starts."""

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
    """What `train` returns."""

    output_dir: Path
    model_dir: Path | None
    """The trained model in Hugging Face format; None if the run was interrupted."""
    steps: int
    """Updates done, over all resumes."""
    evaluations: Mapping[int, Results]
    """Step -> results, over all resumes."""
    interrupted: bool = False


def finished(config: RunConfig) -> RunResult | None:
    """The result of a run whose steps are all done, evaluated where that was asked for, and whose model is saved; None
    where something is left to do."""
    directory = Path(config.output_dir).absolute()
    done = max(checkpoints.found(directory / "checkpoints"), default=-1)
    if done < config.steps or in_use(directory) or not (directory / "model").is_dir():
        return None
    evaluations = {e["step"]: e["results"] for e in read_metrics(directory, "evaluation")}
    unevaluated = bool(config.data.eval) and done == config.steps and done not in evaluations
    if unevaluated or all(entry["step"] != done for entry in read_metrics(directory, MODEL)):
        return None
    return RunResult(directory, directory / "model", done, evaluations)
