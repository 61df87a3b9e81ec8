"""A learner checkpoint: one directory that appears whole or not at all, for any number of ranks.

    learner/  tensors-00000.safetensors ...   param/NAME, exp_avg/NAME, exp_avg_sq/NAME: whole tensors, float32
              rng.safetensors                 one generator state for each rank that wrote it
              state.json                      format, steps, and which file holds which tensor
              digests.json                    size and SHA-256 of every file (learner/durable.py)

It leaves out frozen parameters, which are those of the model that the run started from. Nothing is pickled.
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
"""Tensors are held until a file of about this size is full, which limits the memory that writing takes."""


class CheckpointError(UserError, ValueError):
    """A directory is not a checkpoint of this learner, or does not fit its model."""


def save_checkpoint(engine: TrainEngine, directory: Path) -> None:
    """Write `engine`'s state into `directory`, replacing what was there. Collective; rank 0 writes.

    Raises StorageError, before anything is written if there is too little room, and NotFiniteError, which names the
    first tensor that is not finite. What was there then stays. All ranks complete the collective even then, so that the
    engine stays usable."""
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
        for _ in tensors:  # the other ranks are still iterating
            pass
        raise


def load_checkpoint(engine: TrainEngine, directory: Path) -> None:
    """Continue from `directory`, written by any number of ranks. Collective; every rank reads.

    A rank that did not exist when it was written keeps its initial generator state.
    Raises CheckpointError, which names the first parameter that is missing or has another shape."""
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
    """Yield `(name, float32 tensor)` of every parameter that was trained. Raises CheckpointError for a directory that
    is not a checkpoint, or is damaged."""
    if text := damage(directory):
        raise CheckpointError(f"{directory} is damaged: {text}; use the checkpoint before it")
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
        raise CheckpointError(f"{directory} is not a learner checkpoint: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], directory: Path) -> dict[str, str]:
    """Write tensors, as they come, into files of about FILE_BYTES. Returns tensor name -> file name."""
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
    """Raises NotFiniteError: numbers that are not finite are never written, least of all over good ones."""
    if bad := tensor.numel() - int(tensor.isfinite().sum()):
        raise NotFiniteError(
            f"{directory} was not written, and its former content stays: {bad} of {tensor.numel()} numbers of {name} "
            "are not finite; continue from an earlier checkpoint, with a smaller learner.learning_rate if the last "
            "steps grew"
        )


def gather_generators(engine: TrainEngine) -> list[Tensor]:
    """Give every rank the states of all ranks' CPU generators of torch, uint8."""
    mine = torch.get_rng_state()
    table = torch.zeros(engine.world_size, len(mine), dtype=torch.float64)
    table[engine.rank] = mine.to(torch.float64)
    gathered = torch.tensor(engine.all_reduce_sum(table.flatten().tolist()), dtype=torch.float64)
    return list(gathered.view_as(table).to(torch.uint8))
