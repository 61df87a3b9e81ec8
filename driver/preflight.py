"""Everything that can be known to fail is found before an actor starts, and reported together.

The configuration itself was validated by `driver.config`; here its references are followed: model, adapter, data files,
rewards, precision, output folder.
"""

from __future__ import annotations

from pathlib import Path

from driver.config import ConfigError, RunConfig


def preflight(config: RunConfig, *, resume: bool = False) -> None:
    """Raises ConfigError listing all that would stop the run."""
    problems = [*_model_and_data(config), *_rewards(config), *_output(config, resume)]
    if problems:
        raise ConfigError(problems, "what the configuration refers to")


def _model_and_data(config: RunConfig) -> list[str]:
    from driver.wiring import data_options
    from rollout.prompts import DataError, PromptSource
    from vlm.adapter import AdapterError
    from vlm.registry import load_adapter

    model = config.model
    try:
        adapter = load_adapter(model.path, model.adapter, trust_remote_code=model.trust_remote_code)
    except AdapterError as error:
        return [f"model.path: {error}"]
    problems = []
    longest = getattr(adapter.model_config.get_text_config(), "max_position_embeddings", None)
    needed = config.data.max_prompt_length + config.rollout.max_completion_length
    if longest is not None and needed > longest:
        problems.append(
            f"data.max_prompt_length + rollout.max_completion_length = {needed} tokens, but the model at "
            f"{model.path} takes at most {longest}; lower one of them"
        )
    for files, key in ((config.data.train, "data.train"), (config.data.eval, "data.eval")):
        if not files:
            continue
        try:
            source = PromptSource(data_options(config, files), adapter)
        except DataError as error:
            problems.append(f"{key}: {error}")
            continue
        if key == "data.train" and len(source) < config.learner.prompts_per_step:
            problems.append(
                f"data.train has {len(source)} rows, fewer than learner.prompts_per_step="
                f"{config.learner.prompts_per_step}: a batch would hold a prompt twice"
            )
    return problems


def _rewards(config: RunConfig) -> list[str]:
    from driver.wiring import reward_specs
    from rewards.registry import RewardError, compose

    try:
        compose(reward_specs(config))
    except RewardError as error:
        return [f"reward.functions: {error}"]
    return []


def _output(config: RunConfig, resume: bool) -> list[str]:
    directory = Path(config.output_dir)
    if directory.exists() and not directory.is_dir():
        return [f"output_dir: {directory} exists and is not a folder"]
    if not resume and (directory / "metrics.jsonl").exists():
        return [
            f"output_dir: {directory} holds an earlier run; continue it with --resume, or name another folder "
            "(output_dir=...)"
        ]
    return []
