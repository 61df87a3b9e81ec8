"""Trainer: a run from Python objects, the same as a configuration file would make it.

    trainer = saccade.Trainer("Qwen/Qwen2.5-VL-3B-Instruct", my_reward, {"output_dir": "runs/mine", "steps": 500}, rows)
    trainer.config                  the RunConfig
    trainer.train()                 what has no file is written to output_dir/given, and the run starts

What is wrong with any argument is one ConfigError, with all that is wrong with the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learner.durable import make_folder, storage_errors
from saccade.config.load import config_tree, parse_config
from saccade.config.messages import ConfigError
from saccade.config.run_config import RunConfig
from saccade.trainer import peft, trl
from saccade.trainer.functions import GivenRewards, given_rewards, importable_name
from saccade.trainer.rows import Rows, RowsError, is_files
from saccade.trainer.tree import Tree, columns, put, put_all
from saccade.trainer.trl_loss import ratios_vary

if TYPE_CHECKING:
    from saccade.finished import RunResult
    from saccade.observe.display import Display
    from saccade.pipeline.evaluate import Results
    from vlm.adapter import MultimodalAdapter


class Trainer:
    """Takes what TRL's GRPOTrainer takes."""

    def __init__(
        self,
        model: str | Path | None = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        adapter: str | type[MultimodalAdapter] | None = None,
        peft_config: Any = None,
    ) -> None:
        """Arguments that are None are taken from `args`.

        Args:
            model: a folder or a hub name.
            reward_funcs: functions, as TRL calls them or as docs/rewards.md says; names of shipped rewards;
                file.py:function; mappings of a reward's keys, of which `name` may be a function. One or several.
            args: a RunConfig, a dictionary (of sections, or of dotted names), or a GRPOConfig of TRL. Of several in a
                list the later ones win.
            train_dataset, eval_dataset: a datasets.Dataset, a list of dictionaries, or files; the held-out ones also
                a dictionary of such.
            adapter: a MultimodalAdapter of yours, as a class or as file.py:Class.
            peft_config: a LoraConfig of peft, or a dictionary of its fields, with parts of the model as target_modules.
        Raises:
            ConfigError: with all that is wrong.
        """
        problems: list[str] = []
        tree, train, weights = _settings(args, train_dataset, problems)
        self._rewards = GivenRewards() if reward_funcs is None else given_rewards(reward_funcs, weights, train)
        if reward_funcs is None and weights is not None:
            problems.append("args.reward_weights: given without reward_funcs")
        problems += self._rewards.problems
        self._folder = Path(str(tree.get("output_dir", "."))).absolute() / "given"
        self._files = {} if train is None else {"train.parquet": train}
        objects, found = _objects(model, adapter, peft_config)
        problems += found
        put_all(tree, objects)
        if train_dataset is not None:
            own = [str(self._folder / "train.parquet")]
            put(tree, "data.train", _names(train_dataset) if is_files(train_dataset) else own)
        if eval_dataset is not None:
            put(tree, "data.eval", self._held_out(eval_dataset, tree, problems))
        if self._rewards.specs:
            put(tree, "reward.functions", self._rewards.configured(self._folder))
        if train is not None:
            _name_columns(tree, train, self._rewards)
        self.config: RunConfig = parse_config(tree, "the arguments of saccade.Trainer", problems)
        """The run, as a configuration file would describe it."""

    def train(self, *, resume: bool = False, address: str | None = None, display: Display | None = None) -> RunResult:
        """Write what was given without a file, and train. The arguments and errors are those of `saccade.train`."""
        from saccade.loop import train

        self._write(resume)
        return train(self.config, resume=resume, address=address, display=display)

    def evaluate(self, *, address: str | None = None, display: Display | None = None) -> Results:
        """Evaluate the model as it lies on disk on the held-out data. The errors are those of `saccade.evaluate`."""
        from saccade.loop import evaluate

        self._write(resume=True)
        return evaluate(self.config, address=address, display=display)

    def _write(self, resume: bool) -> None:
        """Raises ConfigError where another run's would be overwritten."""
        from saccade.fleet.run_folder import in_use
        from saccade.preflight import earlier_run

        if not self._files and not self._rewards.sources:
            return
        holder = in_use(Path(self.config.output_dir))
        if problems := [*([holder] if holder else []), *([] if resume else earlier_run(self.config))]:
            raise ConfigError(problems, "what the configuration refers to")
        with storage_errors(self._folder):
            make_folder(self._folder)
            for name, rows in self._files.items():
                rows.write(self._folder / name)
            self._rewards.write(self._folder)

    def _held_out(self, data: Any, tree: Tree, problems: list[str]) -> list[str]:
        """The files of held-out data, one for each of several sets."""
        named = isinstance(data, Mapping)
        files: list[str] = []
        for name, one in data.items() if named else [("", data)]:
            if is_files(one):
                files += _names(one)
            elif (rows := _rows("eval_dataset", one, tree, problems)) is not None:
                file = f"eval-{name}.parquet" if named else "eval.parquet"
                self._files[file] = rows
                files.append(str(self._folder / file))
        return files


def _settings(args: Any, data: Any, problems: list[str]) -> tuple[Tree, Rows | None, Sequence[float] | None]:
    """Return the settings in `args`, the training rows if they are not files, and the weights of the rewards."""
    several = list(args) if isinstance(args, list | tuple) else [] if args is None else [args]
    ours: Tree = {}
    for one in several:
        if isinstance(one, RunConfig | Mapping):
            put_all(ours, _tree(one))
    rows = None if data is None or is_files(data) else _rows("train_dataset", data, ours, problems)
    ranks = learner.get("ranks", 1) if isinstance(learner := ours.get("learner"), dict) else 1
    vary = ratios_vary(_without_clips(several))
    tree: Tree = {}
    weights = None
    for one in several:
        if isinstance(one, RunConfig | Mapping):
            put_all(tree, _tree(one))
        elif trl.is_trl(one):
            knobs, found, weights = trl.carry_over(one, None if rows is None else len(rows), ranks, vary)
            put_all(tree, knobs)
            problems += found
        else:
            problems.append(f"args: {type(one).__name__} is not a RunConfig, a dictionary, or TRL's GRPOConfig")
    return tree, rows, weights


def _without_clips(several: Sequence[Any]) -> Tree:
    """Return the settings that say whether ratios vary. TRL's are the newest weights, unless later settings differ."""
    tree: Tree = {}
    for one in several:
        put_all(tree, _tree(one) if isinstance(one, RunConfig | Mapping) else {"rollout.max_staleness": 0})
    return tree


def _tree(settings: RunConfig | Mapping[str, Any]) -> Mapping[str, Any]:
    return config_tree(settings) if isinstance(settings, RunConfig) else settings


def _rows(where: str, data: Any, tree: Tree, problems: list[str]) -> Rows | None:
    try:
        return Rows.of(data, columns(tree))
    except RowsError as error:
        problems.append(f"{where}: {error}")
    return None


def _names(files: Any) -> list[str]:
    return [str(files)] if isinstance(files, str | Path) else [str(file) for file in files]


def _name_columns(tree: Tree, rows: Rows, rewards: GivenRewards) -> None:
    """`prompt` is the prompt as for TRL, whatever other columns there are. Functions read any column, so that with
    functions alone none has to be the answer."""
    if "prompt" in rows.table.column_names:
        put(tree, "data.columns", {"prompt": "prompt", **columns(tree)})
    if rewards.specs and rewards.only_functions:
        put(tree, "data.columns", {"answer": None, **columns(tree)})


def _objects(model: Any, adapter: Any, peft_config: Any) -> tuple[Tree, list[str]]:
    """Knobs of the model, and what is wrong with what was given for it."""
    knobs: Tree = {}
    problems: list[str] = []
    if isinstance(model, str | Path):
        knobs["model.path"] = str(model)
    elif model is not None:
        problems.append(f"model: {type(model).__name__}: give a folder or a hub name (model.save_pretrained makes one)")
    if inspect.isclass(adapter):
        if (name := importable_name(adapter)) is None:
            problems.append(
                f"adapter: {adapter.__name__} is defined in the script; move it to a module that actors can import"
            )
        adapter = name
    if adapter is not None:
        knobs["model.adapter"] = adapter
    if peft_config is not None:
        carried, found = peft.carry_over(peft_config)
        knobs |= carried
        problems += found
    return knobs, problems
