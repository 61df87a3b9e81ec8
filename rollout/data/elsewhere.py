"""Recognise names of data that are not on this machine (URLs, buckets, data sets of the Hugging Face hub), and say what
to do."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ID = r"([\w-][\w.-]*/[\w-][\w.-]*)"
_ON_HUB = re.compile(rf"(?:hf|https?)://(?:huggingface\.co/)?datasets/{_ID}(?:[@/].*)?", re.IGNORECASE)
_MAYBE_ON_HUB = re.compile(_ID)


def address_problem(name: str) -> str:
    """Explain why an address such as `s3://bucket/data` cannot be used and what to do; empty for a path."""
    scheme = _SCHEME.match(name)
    if scheme is None:
        return ""
    kind = scheme[1].lower()
    if kind == "file":
        return f"files on this machine are given by their path; remove {scheme[0]}"
    return f"this is a URL ({kind}), and only files on this machine can be used; download or mount it and give its path"


def not_here(name: str) -> str:
    """Explain the same for data files, also for names of the Hugging Face hub; empty for a file that is just
    missing."""
    if found := _ON_HUB.fullmatch(name):
        return f"this is on the Hugging Face hub, and only files on this machine can be read; {_download(found[1])}"
    if problem := address_problem(name):
        return problem
    path = Path(name)
    if _MAYBE_ON_HUB.fullmatch(name) and not path.parent.exists() and not re.search("[a-z]", path.suffix.lower()):
        return (
            f"only files on this machine can be read; if this is a data set of the Hugging Face hub, {_download(name)}"
        )
    return ""


def _download(dataset: str) -> str:
    folder = dataset.rpartition("/")[2]
    return (
        f"download it with `hf download {dataset} --repo-type dataset --local-dir {folder}` and name the files, "
        f"as in {folder}/data/train-*.parquet"
    )
