"""Did every engine receive and use exactly what the learner sent? Digests of sent tensors, and load coverage.

learner: name ──▶ digest of what was sent ─────┐
engine:  name ──▶ digest of what arrived ──────┴─▶ mismatches; plus names no layer took, layers nothing reached
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vlm.errors import UserError

CHUNK_WORDS = 65536
CHAIN = 6364136223846793005
"""Odd multiplier that chains the sums of chunks."""
ROWS_PER_STEP = 256
"""Chunks summed at once on an accelerator."""


class WeightSyncError(UserError, RuntimeError):
    """A synchronisation did not complete. Says in which phase, at which engines (none: the learner), and why."""

    def __init__(self, phase: str, engines: Sequence[str], reason: str) -> None:
        """`phase`: what was being done, such as "receiving the weights"."""
        super().__init__(phase, tuple(engines), reason)
        self.phase, self.engines, self.reason = phase, tuple(engines), reason

    def __str__(self) -> str:
        where = f" at {', '.join(self.engines)}" if self.engines else ""
        return f"weight sync failed{where} while {self.phase}: {self.reason}"


class WeightMismatchError(WeightSyncError):
    """An engine received the weights, and what it holds is not what the learner trained. Nothing may be sampled from
    it, and another engine in its place would be no better: the names or the values are wrong, not the machine."""


@dataclass(frozen=True, slots=True)
class WeightReport:
    """One engine's report of an update that it received. Plain data, so that it crosses processes as it is."""

    digests: Mapping[str, str]
    """Name -> digest of every tensor that arrived, the same on all workers of the engine."""
    unconsumed: tuple[str, ...] = ()
    """Names of tensors that arrived and that no parameter of the engine's model took."""
    uncovered: tuple[str, ...] = ()
    """Modules of the engine's model in which some weight elements were not written, or are not computed with."""
    load_seconds: float = 0.0
    """Seconds the engine's processes spent putting what arrived in place, at the slowest of them. On a GPU these are
    the seconds of the host, as in all timings here: kernels that still run are in the next figure."""
    verify_seconds: float = 0.0
    """Seconds for the digests and for looking at what was reached."""


@lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> Tensor:
    """int64 `[CHUNK_WORDS]`, fixed odd pseudo-random numbers, the same on every machine."""
    raw = np.random.PCG64(20).random_raw(CHUNK_WORDS).view(np.int64) | 1
    return torch.from_numpy(raw).to(device)


def hash_words(tensor: Tensor) -> Tensor:
    """64-bit multilinear hash of the tensor's bytes, as an int64 scalar on its own device (no synchronisation).

    A sum of 32-bit words times fixed random 64-bit numbers, modulo 2**64, is strongly universal (Lemire and Kaser,
    "Strongly universal string hashing is fast", 2014); sums of chunks are chained with an odd multiplier. It is integer
    arithmetic, hence the same on CPU and GPU, and runs near memory speed where sha256 would be the slowest part.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = data.numel() // 4 * 4
    words = data[:whole].clone().view(torch.int32) if data.storage_offset() % 4 else data[:whole].view(torch.int32)
    tail = torch.zeros(4, dtype=torch.uint8, device=data.device)
    tail[: data.numel() - whole] = data[whole:]
    multipliers = _multipliers(data.device)
    full = words.numel() // CHUNK_WORDS * CHUNK_WORDS
    rows = words[:full].view(-1, CHUNK_WORDS)
    if data.device.type == "cpu":  # numpy multiplies and adds in one go, torch through a copy of twice the size
        sums = [torch.from_numpy(np.einsum("ij,j->i", rows.numpy(), multipliers.numpy()))]
    else:
        sums = [(block * multipliers).sum(1) for block in torch.split(rows, ROWS_PER_STEP)]
    rest = torch.cat([words[full:], tail.view(torch.int32)]) if full < words.numel() else tail.view(torch.int32)
    sums.append((rest * multipliers[: rest.numel()]).sum().view(1) + data.numel())
    chain = torch.full_like(torch.cat(sums), CHAIN)
    chain[0] = 1
    return (torch.cat(sums) * chain.cumprod(0)).sum()


def digest_text(dtype: torch.dtype, shape: Sequence[int], words: Tensor) -> str:
    """The digest as compared: dtype, shape and the hash of the content in hex."""
    sizes = "x".join(map(str, shape))
    return f"{str(dtype).removeprefix('torch.')}[{sizes}]:{int(words) & 0xFFFFFFFFFFFFFFFF:016x}"


def tensor_digest(tensor: Tensor) -> str:
    """Digest of dtype, shape and content. Equal tensors have equal digests on any device."""
    return digest_text(tensor.dtype, tensor.shape, hash_words(tensor))


def merge_worker_reports(reports: Sequence[WeightReport]) -> WeightReport:
    """Merge the reports of an engine's workers (tensor parallel ranks), which must have received the same.

    Raises WeightMismatchError naming the first names on which workers differ."""
    first = reports[0]
    for rank, other in enumerate(reports[1:], start=1):
        problems = mismatches(first.digests, other.digests)
        if problems:
            raise WeightMismatchError(
                "receiving the weights", (), f"worker {rank} and worker 0 received different bytes: {problems}"
            )
    return WeightReport(
        first.digests,
        tuple(sorted({n for r in reports for n in r.unconsumed})),
        tuple(sorted({n for r in reports for n in r.uncovered})),
        max(r.load_seconds for r in reports),
        max(r.verify_seconds for r in reports),
    )


def mismatches(sent: Mapping[str, str], received: Mapping[str, str], limit: int = 5) -> str:
    """Say how two name -> digest maps differ, with at most `limit` names of each kind; empty if they are equal."""
    missing = [n for n in sent if n not in received]
    unknown = [n for n in received if n not in sent]
    changed = [f"{n} (sent {d}, received {received[n]})" for n, d in sent.items() if n in received and received[n] != d]
    kinds = (("never arrived", missing), ("never sent", unknown), ("differ", changed))
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:limit])}{' ...' if len(names) > limit else ''}"
        for kind, names in kinds
        if names
    )


def problems_of(sent: Mapping[str, str], report: WeightReport, limit: int = 5) -> str:
    """Say what is wrong with one engine's report; empty if the engine holds exactly the weights that were sent."""
    found = [text for text in [mismatches(sent, report.digests, limit)] if text]
    for names, meaning in (
        (
            report.unconsumed,
            "tensors were sent that no parameter of the engine took (check the adapter's engine_weight_name)",
        ),
        (report.uncovered, "modules of the engine kept old weight elements (was a parameter not sent?)"),
    ):
        if names:
            found.append(f"{len(names)} {meaning}: {', '.join(names[:limit])}{' ...' if len(names) > limit else ''}")
    return "; ".join(found)
