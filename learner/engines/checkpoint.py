"""A learner checkpoint: one directory that appears whole or not at all, and knows nothing of the number of ranks.

    learner/  tensors-00000.safetensors ...   param/NAME, exp_avg/NAME, exp_avg_sq/NAME: whole tensors, float32
              rng.safetensors                 one generator state per rank that wrote it
              state.json                      format, steps, and which file holds which tensor
              digests.json                    size and SHA-256 of every file (learner/durable.py)

Frozen parameters are not in it: they are those of the model the run started from. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.durable import StorageError, atomic_directory, damage
from learner.engines.protocol import TrainEngine
from learner.types import NotFiniteError
from vlm.errors import UserError

FORMAT = 2
FILE_BYTES = 2 * 2**30
"""Tensors are held until a file of about this size is full: it bounds what writing takes in memory."""


class CheckpointError(UserError, ValueError):
    """A directory that is no checkpoint of this learner, or does not fit its model."""


def save_checkpoint(engine: TrainEngine, directory: Path) -> None:
    """Write `engine`'s state into `directory`, replacing what was there. Collective; rank 0 writes.

    Raises StorageError, before anything is written where its size is seen not to fit, and NotFiniteError naming the
    first tensor that is not finite; what was there stands. All ranks go through the whole collective then too, so that
    the engine stays usable."""
    generators = gather_generators(engine)
    if engine.rank != 0:
        for _ in engine.state_tensors():
            pass
        return
    tensors = engine.state_tensors()
    try:
        with atomic_directory(directory, needed=engine.state_bytes(), sealed=True) as partial:
            where = _write_tensors(tensors, partial)
            save_file({str(rank): state for rank, state in enumerate(generators)}, partial / "rng.safetensors")
            state = {"format": FORMAT, "steps": engine.steps, "ranks": engine.world_size, "tensors": where}
            (partial / "state.json").write_text(json.dumps(state, indent=1))
    except (StorageError, NotFiniteError):
        for _ in tensors:  # the other ranks are on their way through it
            pass
        raise


def load_checkpoint(engine: TrainEngine, directory: Path) -> None:
    """Continue from `directory`, written by any number of ranks. Collective; every rank reads.

    A rank that did not exist when it was written keeps the generator it started with.
    Raises CheckpointError naming the first parameter that is missing or has another shape."""
    state = _read_state(directory)
    where: dict[str, str] = state["tensors"]

    def read(name: str, shape: Sequence[int]) -> Tensor:
        if name not in where:
            raise CheckpointError(
                f"{directory} has no {name}: was it written by training another model, or other layers?"
            )
        tensor = _read_tensor(directory / where[name], name)
        if tuple(tensor.shape) != tuple(shape):
            raise CheckpointError(
                f"{directory} has {name} of shape {tuple(tensor.shape)}, but the model's is {tuple(shape)}: was it "
                "written with another model or LoRA rank?"
            )
        return tensor

    engine.load_state_tensors(read, int(state["steps"]))
    try:
        generators = load_file(directory / "rng.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / 'rng.safetensors'} is damaged: {error}") from error
    if str(engine.rank) in generators:
        torch.set_rng_state(generators[str(engine.rank)])


def read_weights(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """`(name, float32 tensor)` of every parameter that was trained. Raises CheckpointError for what is none, or is not
    as it was written."""
    if text := damage(directory):
        raise CheckpointError(f"{directory} is damaged: {text}; take the checkpoint before it")
    for name, file_name in _read_state(directory)["tensors"].items():
        if name.startswith("param/"):
            yield name.removeprefix("param/"), _read_tensor(directory / file_name, name)


def _read_tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read_state(directory: Path) -> dict[str, Any]:
    path = directory / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} is no learner checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> dict[str, str]:
    """Write tensors as they come into files of about FILE_BYTES. Returns tensor name -> file name."""
    where: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal held, size
        name = f"tensors-{len(set(where.values())):05d}.safetensors"
        save_file(held, directory / name)
        where.update(dict.fromkeys(held, name))
        held, size = {}, 0

    for name, tensor in tensors:
        check_finite(name, tensor, directory)
        held[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        size += held[name].nbytes
        if size >= FILE_BYTES:
            flush()
    if held:
        flush()
    return where


def check_finite(name: str, tensor: Tensor, directory: Path) -> None:
    """Raises NotFiniteError: what is not finite is written nowhere, least of all over what is."""
    if bad := tensor.numel() - int(tensor.isfinite().sum()):
        raise NotFiniteError(
            f"{directory} is not written, and what was there stands: {bad} of {tensor.numel()} numbers of {name} are "
            "not finite; go on from an earlier checkpoint, with a smaller learner.learning_rate if the last steps grew"
        )


def gather_generators(engine: TrainEngine) -> list[Tensor]:
    """Every rank's state of torch's CPU generator, uint8, on every rank."""
    mine = torch.get_rng_state()
    table = torch.zeros(engine.world_size, len(mine), dtype=torch.float64)
    table[engine.rank] = mine.to(torch.float64)
    gathered = torch.tensor(engine.all_reduce_sum(table.flatten().tolist()), dtype=torch.float64)
    return list(gathered.view_as(table).to(torch.uint8))
