"""Where media may come from: rows, files under the root, the web if allowed; all else is a counted refusal."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from rollout.data import media_files
from rollout.data.source import DataError, PromptSource
from tests.helpers.data_helpers import FakeAdapter, FakeImageAdapter, png, source, write_rows
from vlm.tiny.noise import noise_sound, noise_video

RED = png("red")


def refusal(folder: Path, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """Kind and reason for which a row is refused, while the good one beside it is not."""
    (folder / "good.png").write_bytes(RED)
    rows = [{"prompt": "good", "image": "good.png"}, {"prompt": "bad", **row}]
    data = source(write_rows(folder / "data.jsonl", rows), max_refused_share=1.0, **options)
    assert [p.ref.row for p in data.one_epoch()] == [0]
    (found,) = data.report().first_refusals
    assert (found.row, data.report().refused) == (1, {found.kind: 1})
    return found.kind, found.reason


# ---------------------------------------------------------------------- files


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """`data/` and beside it a file that is none of its business."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(RED)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "name", ["../outside.png", "sub/../../outside.png", "/etc/hostname", "link.png", "linked/x.png"]
)
def test_no_path_leads_out_of_the_root(folders: Path, name: str) -> None:
    (folders / "link.png").symlink_to(folders.parent / "outside.png")
    (folders / "linked").symlink_to(folders.parent)
    kind, reason = refusal(folders, {"image": name})
    assert kind == "outside root"
    assert "(data.media_from)" in reason
    assert str(folders) in reason


def test_what_stays_inside_is_read_whatever_way_it_is_named(folders: Path) -> None:
    (folders / "sub" / "a.png").write_bytes(RED)
    (folders / "link.png").symlink_to("sub/a.png")
    names = ["sub/a.png", "sub/../sub/a.png", str(folders / "sub/a.png"), "link.png"]
    data = source(write_rows(folders / "a.jsonl", [{"prompt": "q", "image": name} for name in names]))
    assert len(list(data.one_epoch())) == 4


def test_a_root_of_its_own(folders: Path) -> None:
    path = write_rows(folders / "a.jsonl", [{"prompt": "q", "image": "outside.png"}])
    (prompt,) = source(path, media_from=(str(folders.parent),)).one_epoch()
    assert prompt.media[0].data == RED
    kind, reason = refusal(folders, {"image": "../outside.png"}, media_from=(str(folders),))
    assert (kind, f"outside {folders}" in reason) == ("outside root", True)


@pytest.mark.parametrize("name", ["gone.png", "sub", "", "a\x00b.png", "n" * 5000, "circle"])
def test_what_is_no_file_is_missing(folders: Path, name: str) -> None:
    (folders / "circle").symlink_to("circle")
    assert refusal(folders, {"image": name})[0] == "missing image"


# ---------------------------------------------------------------------- contents


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A small PNG of many pixels: zeros compress well."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = zlib.compress(b"\x00" * (1 + (width + 7) // 8) * height)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(folder: Path) -> bytes:
    Image.effect_noise((200, 200), 90).convert("RGB").save(folder / "noise.jpg")
    return (folder / "noise.jpg").read_bytes()


def swollen_text() -> bytes:
    """A PNG whose text chunk unpacks to far more than it weighs."""
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)))
    return RED[:33] + text + RED[33:]


def test_damaged_and_dangerous_images_are_refused(tmp_path: Path) -> None:
    whole = jpeg(tmp_path)
    contents = {
        "truncated.jpg": whole[: len(whole) // 2],
        "truncated.png": png(size=(300, 300))[:-40],
        "text.png": b"no image at all",
        "empty.png": b"",
        "page.html": b"<html><body>404</body></html>",
        "swollen.png": swollen_text(),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
        kind, reason = refusal(tmp_path, {"image": name})
        assert (kind, "image 0: not a readable image" in reason) == ("bad image", True), name
    for side in (8_000, 60_000):  # the second beyond what Pillow itself opens
        (tmp_path / "bomb.png").write_bytes(bomb(side, side))
        kind, reason = refusal(tmp_path, {"image": "bomb.png"})
        assert kind == "image too large"
        assert "(it follows data.max_media_bytes)" in reason or "decompression bomb" in reason
    kind, reason = refusal(tmp_path, {"image": "noise.jpg"}, max_media_bytes=len(whole) - 1)
    assert (kind, f"image 0: {len(whole):,} bytes, the limit is" in reason) == ("image too large", True)


def test_videos_and_sounds_are_refused_the_same_way(tmp_path: Path) -> None:
    video, sound = noise_video(0).data, noise_sound(0).data
    for name, data in {"v.mp4": video, "half.mp4": video[: len(video) // 2], "s.wav": sound, "x.wav": b"RIFF"}.items():
        (tmp_path / name).write_bytes(data)
    cases: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
        ({"video": "half.mp4"}, {}, "bad video", "video 0: not a readable video"),
        ({"video": "s.wav"}, {}, "bad video", "the file has no video"),
        ({"video": ["v.mp4", "gone.mp4"]}, {}, "missing video", "video 1: no file"),
        ({"video": ["v.mp4"] * 3}, {}, "video count", "3 videos, the limit is 2"),
        ({"video": "v.mp4"}, {"adapter": FakeImageAdapter()}, "video count", "1 video(s), but the model takes none"),
        ({"audio": "x.wav"}, {}, "bad audio", "not a readable video or sound"),
        ({"audio": "../x.wav"}, {}, "outside root", "audio 0"),
        ({"audio": {"path": None, "bytes": None}}, {}, "missing audio", "neither 'bytes' nor 'path'"),
        ({"audio": {"array": [0.0], "sampling_rate": 16000}}, {}, "missing audio", "neither 'bytes' nor 'path'"),
    ]
    for row, options, kind, reason in cases:
        found = refusal(tmp_path, row, **options)
        assert found[0] == kind, found
        assert reason in found[1]


def test_a_video_of_too_many_pixels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.mp4").write_bytes(noise_video(0).data)
    monkeypatch.setattr("rollout.data.config.PIXELS_PER_BYTE", (84 * 56 - 1) / 2**20)
    found = refusal(tmp_path, {"video": "v.mp4"}, max_media_bytes=2**20)
    assert (found[0], "4,704 pixels a frame, the limit is 4,703" in found[1]) == ("video too large", True), found


def test_a_good_file_is_decoded_once_but_other_bytes_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rollout.data import builder as prompt_builder

    decoded: list[bytes] = []
    check = prompt_builder.check_image
    monkeypatch.setattr(prompt_builder, "check_image", lambda data, limits: decoded.append(data) or check(data, limits))
    rows = [{"prompt": f"{n}", "image": f"{n % 2}.png"} for n in range(8)]
    for n, colour in enumerate(("red", "blue")):
        (tmp_path / f"{n}.png").write_bytes(png(colour))
    data = source(write_rows(tmp_path / "a.jsonl", rows))
    prompts = data.take(24)
    assert sorted(decoded) == sorted([png("red"), png("blue")])
    assert all(p.media[0].data == png(("red", "blue")[p.ref.row % 2]) for p in prompts)


# ---------------------------------------------------------------------- a template without images


class BlindTemplate(FakeAdapter):
    """The chat template of a text model before a model that sees."""

    def render(self, messages: Any) -> str:
        return "".join(f"{m['role']}:{''.join(p.get('text', '') for p in m['content'])}\n" for m in messages)


def test_no_sample_is_trained_without_its_image_by_a_template_that_drops_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"prompt": "q", "image": RED}] * 3)
    data = source(path, adapter=BlindTemplate(), max_refused_share=1.0)
    with pytest.raises(DataError, match="can be used"):
        data.take(1)
    assert data.report().refused == {"image count": 3}
    assert "does the model's chat template take them?" in data.report().first_refusals[0].reason


def test_a_real_model_whose_template_knows_no_images(tiny_model: Path, tmp_path: Path) -> None:
    from vlm.families.registry import load_adapter

    adapter = load_adapter(str(tiny_model))
    options = source(write_rows(tmp_path / "a.parquet", [{"prompt": "q", "image": RED}]), max_refused_share=1.0).options
    for template in (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",  # prints the list of parts
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] + '' }}{% endfor %}",  # takes texts alone
        None,
    ):
        adapter.processor.chat_template = adapter.tokenizer.chat_template = template
        data = PromptSource(options, adapter)
        with pytest.raises(DataError, match="can be used"):
            data.take(1)
        assert data.report().refused_total == 1


# ---------------------------------------------------------------------- the web


class Web(BaseHTTPRequestHandler):
    """What comes of a path: the file, a redirect, an error; an answer that is cut off, has no end, or never comes."""

    released = threading.Event()

    def do_GET(self) -> None:
        where = self.path
        if where.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", where.removeprefix("/to/"))
            self.end_headers()
        elif where == "/gone.png":
            self.send_error(404)
        elif where == "/silent.png":
            self.released.wait(60)
        else:
            data = RED + b"\x00" * (1000 if where == "/large.png" else 0)
            self.send_response(200)
            if where not in ("/unannounced.png", "/endless.png"):
                self.send_header("Content-Length", str(len(data) + (100 if where == "/cut.png" else 0)))
            self.end_headers()
            self.wfile.write(data)
            with suppress(OSError):  # the other side hangs up
                while where == "/endless.png":
                    self.wfile.write(b"\x00" * 1000)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield f"http://127.0.0.1:{server.server_port}"
    Web.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_fetched_where_that_is_allowed(web: str, tmp_path: Path) -> None:
    urls = [f"{web}/a.png", f"{web}/unannounced.png", f"{web}/to/{web}/a.png", {"path": f"{web}/a.png"}]
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "image": url} for url in urls])
    prompts = list(source(path, media_from=("urls",)).one_epoch())
    assert [p.media[0].data for p in prompts] == [RED] * 4
    kind, reason = refusal(tmp_path, {"image": urls[0]})
    assert (kind, "set data.media_from=urls to fetch it" in reason) == ("URL refused", True)


@pytest.mark.parametrize(
    ("url", "kind", "reason"),
    [
        ("{web}/gone.png", "failed fetch", "HTTP Error 404"),
        ("{web}/cut.png", "failed fetch", "ended 100 bytes early"),
        ("{web}/to/ftp://127.0.0.1/a.png", "failed fetch", "unknown url type: ftp"),
        ("{web}/to/file:///etc/hostname", "failed fetch", "is not allowed"),
        ("{web}/to/{web}/gone.png", "failed fetch", "HTTP Error 404"),
        ("http://127.0.0.1:1/a.png", "failed fetch", "refused"),
        ("http://[broken/a.png", "failed fetch", "http://[broken"),
        ("http:///a.png", "failed fetch", "no host given"),
        ("file:///etc/hostname", "URL refused", "is a file URL; only http and https"),
        ("FTP://127.0.0.1/a.png", "URL refused", "is a ftp URL"),
        ("s3://bucket/a.png", "URL refused", "is a s3 URL"),
        ("data:text/plain,aGk=", "URL refused", "is a data URL"),
    ],
)
def test_failed_and_forbidden_fetches_are_counted(web: str, tmp_path: Path, url: str, kind: str, reason: str) -> None:
    found = refusal(tmp_path, {"image": url.replace("{web}", web)}, media_from=("urls",))
    assert found[0] == kind
    assert reason in found[1]


@pytest.mark.parametrize("name", ["large.png", "endless.png"])
def test_what_is_too_large_is_not_fetched_to_its_end(web: str, tmp_path: Path, name: str) -> None:
    found = refusal(tmp_path, {"image": f"{web}/{name}"}, media_from=("urls",), max_media_bytes=len(RED) + 999)
    assert (found[0], f"the limit is {len(RED) + 999:,}" in found[1]) == ("image too large", True)


def test_an_answer_that_does_not_come_is_given_up(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_files, "FETCH_SECONDS", 0.05)
    found = refusal(tmp_path, {"image": f"{web}/silent.png"}, media_from=("urls",))
    assert (found[0], "timed out" in found[1]) == ("failed fetch", True)


def test_an_answer_that_drips_is_given_up(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, media_files.FETCH_SECONDS + 1])
    monkeypatch.setattr(media_files, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = refusal(tmp_path, {"image": f"{web}/a.png"}, media_from=("urls",))
    assert (found[0], "not complete after 20 s" in found[1]) == ("failed fetch", True)
