"""Names of what is not on this machine: URLs, buckets, data sets of the Hugging Face hub; and what to do about them."""

from __future__ import annotations

import re
from pathlib import Path

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_ID = r"([\w-][\w.-]*/[\w-][\w.-]*)"
_ON_HUB = re.compile(rf"(?:hf|https?)://(?:huggingface\.co/)?datasets/{_ID}(?:[@/].*)?", re.IGNORECASE)
_MAYBE_ON_HUB = re.compile(_ID)


def address_problem(name: str) -> str:
    """Why an address such as `s3://bucket/data` is not used, and what to do; empty for a path."""
    scheme = _SCHEME.match(name)
    if scheme is None:
        return ""
    kind = scheme[1].lower()
    if kind == "file":
        return f"what is on this machine is given by its path; leave {scheme[0]} out"
    return f"only what is on this machine is used, and this is a URL ({kind}); download or mount it, and give its path"


def not_here(name: str) -> str:
    """The same for data files, those of the Hugging Face hub told apart; empty for a file that is just missing."""
    if found := _ON_HUB.fullmatch(name):
        return f"only files of this machine are read, and this is on the Hugging Face hub; {_download(found[1])}"
    if problem := address_problem(name):
        return problem
    path = Path(name)
    if _MAYBE_ON_HUB.fullmatch(name) and not path.parent.exists() and not re.search("[a-z]", path.suffix.lower()):
        return f"only files of this machine are read; a data set of the Hugging Face hub: {_download(name)}"
    return ""


def _download(dataset: str) -> str:
    folder = dataset.rpartition("/")[2]
    return (
        f"download it with `hf download {dataset} --repo-type dataset --local-dir {folder}`, and name the files, as in "
        f"{folder}/data/train-*.parquet"
    )
