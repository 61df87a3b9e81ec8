"""bench.scale: a fleet of its smallest size goes through its steps, and what it counts in the driver is counted."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

from bench.scale_actors import IMAGE_BYTES, MARK
from bench.scale_run import Watched, fleet, measured, received
from bench.scale_settings import SETTINGS


def test_an_engine_fills_whole_batches_and_no_pixel_reaches_the_driver(local_ray) -> None:
    setting = replace(SETTINGS["Qwen2.5-VL-7B"], tokens=20)
    run = fleet(setting, engines=1, faster=100.0)
    found = asyncio.run(measured(run, warmup=1, steps=2))
    # The 32 groups of an engine are those of a step and of 3 steps ahead: 8 of a step.
    assert found["groups"] == 2 * 8
    assert 8 < found["in_flight"] <= 32
    assert run.version == 3 and run.rollouts.groups.trained == 3 * 8
    assert found["pixel_bytes"] == 0 and found["object_bytes_per_group"] > 0
    assert found["cpu_ms_per_group"] > 0 and found["received_bytes_per_group"] > 0
    assert found["late"] >= 1, "no group is sampled in less than the time of its longest completion"


def test_an_image_that_reaches_the_driver_is_counted(local_ray) -> None:
    reference = local_ray.put(MARK + bytes(IMAGE_BYTES - len(MARK)))
    watched = Watched()
    with watched.deserialized():
        local_ray.get(reference)
    assert IMAGE_BYTES <= watched.pixels == watched.objects
    local_ray.get(reference)
    assert watched.pixels < 2 * IMAGE_BYTES, "nothing is counted afterwards"


def test_what_connections_receive_is_counted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        other, _ = server.accept()
        with other:
            before = received()
            for sender, receiver, count in ((client, other, 50_000), (other, client, 70_000)):
                sender.sendall(bytes(count))
                while count:
                    count -= len(receiver.recv(count))
            # Ray may receive something meanwhile.
            assert 120_000 <= received() - before < 190_000
