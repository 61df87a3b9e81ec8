"""The encoded bytes of a row's media: from the row itself, a file under the data root, or, where allowed, the web."""

from __future__ import annotations

import re
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rollout.rows import RowRefusedError
from rollout.types import MediaKind

FETCH_SECONDS = 20.0
"""Longest wait for an answer from the web, and for the whole of one."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):")


class MediaFiles:
    """Reads media under one set of rules; remembers nothing."""

    def __init__(self, *, root: Path | None, allow_urls: bool, max_bytes: int) -> None:
        """`root`: where relative paths start and all paths must end up; None: the folder of each data file."""
        self._root = root.resolve() if root is not None else None
        self._max_bytes = max_bytes
        self._opener = _web_opener() if allow_urls else None

    def read(self, item: Any, kind: MediaKind, n: int, directory: Path) -> bytes:
        """The bytes of item `n` of a row: bytes, a path, a URL, or a struct {bytes, path}.

        `directory`: the data file's folder. Raises RowRefusedError."""
        where = f"{kind} {n}: "
        if isinstance(item, dict):
            data = item.get("bytes")
            item = data if data is not None else item.get("path")
            if data is not None and not isinstance(data, bytes):
                raise RowRefusedError(f"bad {kind}", f"{where}'bytes' holds {type(data).__name__}, not bytes")
            if item is None:
                raise RowRefusedError(f"missing {kind}", f"{where}neither 'bytes' nor 'path' is given")
        if isinstance(item, bytes):
            self._check_size(len(item), kind, where)
            return item
        if not isinstance(item, str):
            refusal = f"missing {kind}" if item is None else f"bad {kind}"
            found = "nothing" if item is None else type(item).__name__
            raise RowRefusedError(refusal, f"{where}expected bytes, {{bytes, path}} or a path, found {found}")
        scheme = _SCHEME.match(item)
        if scheme is not None:
            return self._fetch(item, (scheme[1] or scheme[2]).lower(), kind, where)
        return self._read_file(item, kind, where, directory)

    def _check_size(self, size: int, kind: MediaKind, where: str) -> None:
        if size > self._max_bytes:
            raise RowRefusedError(
                f"{kind} too large", f"{where}{size:,} bytes, the limit is {self._max_bytes:,} (data.max_image_bytes)"
            )

    def _read_file(self, name: str, kind: MediaKind, where: str, directory: Path) -> bytes:
        root = self._root or directory.resolve()
        try:
            path = (root / name).resolve()  # symbolic links followed
            if not path.is_relative_to(root):
                raise RowRefusedError("outside root", f"{where}{name!r} leads to {path}, outside {root} (data.root)")
            if not path.is_file():
                raise RowRefusedError(f"missing {kind}", f"{where}no file {path}")
            self._check_size(path.stat().st_size, kind, where)
            return path.read_bytes()
        except RowRefusedError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no right to read; a NUL in the name; links in a circle
            raise RowRefusedError(f"missing {kind}", f"{where}{name!r} cannot be read: {error}") from error

    def _fetch(self, url: str, scheme: str, kind: MediaKind, where: str) -> bytes:
        shown = repr(url if len(url) <= 100 else url[:100] + "...")
        if scheme not in ("http", "https"):
            raise RowRefusedError("URL refused", f"{where}{shown} is a {scheme} URL, which is never read")
        if self._opener is None:
            raise RowRefusedError(
                "URL refused", f"{where}{shown} is a URL, and none is fetched without data.allow_urls; store the file"
            )
        try:
            return self._download(url, kind, where)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, RowRefusedError):
                raise
            raise RowRefusedError("failed fetch", f"{where}{shown}: {error or type(error).__name__}") from error

    def _download(self, url: str, kind: MediaKind, where: str) -> bytes:
        assert self._opener is not None
        deadline = time.monotonic() + FETCH_SECONDS
        data = bytearray()
        with self._opener.open(url, timeout=FETCH_SECONDS) as answer:
            self._check_size(answer.length or 0, kind, where)
            while piece := answer.read1(2**16):
                data += piece
                self._check_size(len(data), kind, where)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {FETCH_SECONDS:g} s")
            if answer.length:
                raise OSError(f"ended {answer.length:,} bytes early")
        return bytes(data)


def _web_opener() -> urllib.request.OpenerDirector:
    """Follows redirects, but to http and https alone: urllib's own would open ftp and local files too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener
