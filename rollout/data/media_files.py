"""Read the encoded bytes of a row's media: from the row itself (bytes or base64 text), from a file under the data root,
or, if allowed, from the web.

Base64 text differs from a path in its beginning: the signature of an image, video or sound (`iVBORw0KGgo` for PNG).
"""

from __future__ import annotations

import base64
import re
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rollout.data.rows import RowRefusedError, shown
from vlm.media.types import MediaKind

FETCH_SECONDS = 20.0
"""Time limit for the first byte of an answer from the web, and for the whole answer."""
MIN_BASE64 = 40
"""Length of the base64 text of the smallest picture."""
LONGEST_NAME = 255
"""Longest path below the folder of the data; longer texts are hardly paths."""

_STANDARD = str.maketrans("-_", "+/")
"""Translates the URL-safe base64 alphabet to the usual one."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(data):", re.IGNORECASE)
_DATA_URL = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=_\-\s]")
SIGNATURES = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF....(?:WEBP|WAVE|AVI )|BM.{4}\0{4}|II\*\0|MM\0\*|....ftyp"
    rb"|\x1aE\xdf\xa3|OggS|ID3|fLaC",
    re.DOTALL,
)
"""The first bytes of image, video and sound files."""


class MediaFiles:
    """Reads media under one set of rules. It has no state."""

    def __init__(self, *, root: Path | None, allow_urls: bool, max_bytes: int) -> None:
        """Relative paths start at `root`, and no path may lead outside of it. None: the folder of each data file."""
        self._root = root.resolve() if root is not None else None
        self._max_bytes = max_bytes
        self._opener = _web_opener() if allow_urls else None

    def read(self, item: Any, kind: MediaKind, n: int, directory: Path) -> bytes:
        """Return the bytes of item `n` of a row, which is bytes, base64 text, a path, a URL, or a struct {bytes, path}.

        `directory` is the data file's folder. Raises RowRefusedError."""
        where = f"{kind} {n}: "
        if isinstance(item, dict):
            data = item.get("bytes")
            item = data if data is not None else item.get("path")
            if isinstance(data, str):
                return self._decode(_DATA_URL.sub("", data[:300], count=1) + data[300:], kind, where)
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
        if (url := _DATA_URL.match(item)) is not None:
            return self._decode(item[url.end() :], kind, where)
        if _is_base64(item):
            return self._decode(item, kind, where)
        scheme = _SCHEME.match(item)
        if scheme is not None:
            return self._fetch(item, (scheme[1] or scheme[2]).lower(), kind, where)
        return self._read_file(item, kind, where, directory)

    def _check_size(self, size: int, kind: MediaKind, where: str) -> None:
        if size > self._max_bytes:
            raise RowRefusedError(
                f"{kind} too large", f"{where}{size:,} bytes, the limit is {self._max_bytes:,} (data.max_media_bytes)"
            )

    def _decode(self, text: str, kind: MediaKind, where: str) -> bytes:
        """Decode base64 text in either alphabet, with or without line breaks."""
        self._check_size(len(text) * 3 // 4 - 2, kind, where)  # before it is copied
        text = "".join(text.split()).translate(_STANDARD).rstrip("=")
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        except ValueError as error:  # its message quotes no text
            raise RowRefusedError(
                f"bad {kind}", f"{where}not readable as base64 text ({error}): {shown(text)}"
            ) from error
        self._check_size(len(data), kind, where)
        return data

    def _read_file(self, name: str, kind: MediaKind, where: str, directory: Path) -> bytes:
        root = self._root or directory.resolve()
        try:
            path = (root / name).resolve()  # symbolic links followed
            if not path.is_relative_to(root):
                raise RowRefusedError("outside root", f"{where}{shown(name)} leads outside {root} (data.media_from)")
            if not path.is_file():
                raise RowRefusedError(f"missing {kind}", f"{where}{_no_file(name, path)}")
            self._check_size(path.stat().st_size, kind, where)
            return path.read_bytes()
        except RowRefusedError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no permission; a NUL in the name; a cycle of links
            reason = getattr(error, "strerror", None) or error  # the whole message quotes the name
            long = len(name) > LONGEST_NAME
            said = _no_file(name, root) if long else f"{shown(name)} cannot be read: {reason!s:.80}"
            raise RowRefusedError(f"missing {kind}", where + said) from error

    def _fetch(self, url: str, scheme: str, kind: MediaKind, where: str) -> bytes:
        if scheme not in ("http", "https"):
            only = "; data URLs must be base64" if scheme == "data" else "; only http and https URLs can be fetched"
            raise RowRefusedError("URL refused", f"{where}{shown(url)} is a {scheme} URL{only}")
        if self._opener is None:
            raise RowRefusedError(
                "URL refused",
                f"{where}{shown(url)} is a URL; download the file, or set data.media_from=urls to fetch it",
            )
        try:
            return self._download(url, kind, where)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, RowRefusedError):
                raise
            raise RowRefusedError(
                "failed fetch", f"{where}{shown(url)}: {str(error)[:120] or type(error).__name__}"
            ) from error

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


def _is_base64(text: str) -> bool:
    """Return whether `text` is the base64 text of a file of a known format. A path hardly begins like one, without a
    dot or an extension."""
    if len(text) < MIN_BASE64 or _NOT_BASE64.search(text):
        return False
    head = "".join(text[:64].split())[:24].translate(_STANDARD)
    try:
        return SIGNATURES.match(base64.b64decode(head[: len(head) // 4 * 4])) is not None
    except ValueError:
        return False


def _no_file(name: str, path: Path) -> str:
    """Describe a path to a missing file, or a text that is not a path. A long path is cut at its beginning, since its
    end tells the files of a folder apart."""
    if len(name) > LONGEST_NAME and not _NOT_BASE64.search(name):
        return f"{shown(name)} is neither a path nor base64 text of a known format ({len(name):,} characters)"
    if len(name) > LONGEST_NAME:
        return f"{shown(name)} is a text of {len(name):,} characters, not a path"
    return f"no file {path}" if len(str(path)) <= 160 else f"no file ...{str(path)[-160:]}"


def _web_opener() -> urllib.request.OpenerDirector:
    """Return an opener that follows redirects to http and https only. The default one would also open ftp and local
    files."""
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


_SUFFIXES: dict[str, MediaKind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"), "image"),
    **dict.fromkeys((".mp4", ".webm", ".mov", ".mkv", ".avi"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a"), "audio"),
}
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*")


def media_kind(value: Any, directory: Path) -> MediaKind | None:
    """Return the kind of media of a value: an encoded image, a struct with one, a path of a file that exists, a URL (by
    its suffix), or a list of these. None for anything else."""
    if isinstance(value, list):
        return next((kind for item in value if (kind := media_kind(item, directory)) is not None), None)
    if isinstance(value, dict):
        return media_kind(value.get("bytes"), directory) or media_kind(value.get("path"), directory)
    if isinstance(value, bytes):
        return "image" if value.startswith(_BEGINNINGS) or value[8:12] == b"WEBP" else None
    if not isinstance(value, str) or len(value) > 4096:
        return "image" if isinstance(value, str) and value.startswith("data:image/") else None
    if value.startswith("data:image/"):
        return "image"
    kind = _SUFFIXES.get(Path(value).suffix.lower())
    with suppress(OSError, ValueError):
        if kind is not None and (_SCHEME.match(value) or (directory / value).is_file()):
            return kind
    return None
