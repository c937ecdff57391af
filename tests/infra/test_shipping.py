"""What workers without our disk are sent: files by their content, and a user's own modules."""

import io
import os
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

from deepzero_core.errors import RequestError
from infra import own_code, shipping
from infra.cluster import connect
from infra.own_code import archive, own_packages
from infra.shipping import BLOCK, Parcel, Shipment, received


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connect(2, None, 60) as client:
        yield client


def arrivals(client: Client, parcel: Parcel) -> list[tuple[str, bytes]]:
    """Path and content, as every worker sees them."""

    def arrive(parcel: Parcel) -> tuple[str, bytes]:
        path = received(parcel)
        return str(path), path.read_bytes()

    workers = list(client.nthreads())
    futures = [client.submit(arrive, parcel, workers=[worker], pure=False) for worker in workers]
    return [future.result(timeout=60) for future in futures]


def test_a_file_of_several_blocks_arrives_on_every_worker_and_stays(client: Client, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(2 * BLOCK + 17)
    (tmp_path / "weights").write_bytes(content)
    with Shipment(client) as shipment:
        parcel = shipment.file(tmp_path / "weights")
        assert (len(parcel.blocks), parcel.size) == (3, len(content))
        found = arrivals(client, parcel)
    assert len(found) == 2 and {data for _, data in found} == {content}
    # The blocks are gone now, and nobody needs them: the file is known by its content.
    assert arrivals(client, Parcel(parcel.digest, parcel.size, ())) == found


def test_what_is_damaged_on_a_workers_disk_is_fetched_again(client: Client) -> None:
    with Shipment(client) as shipment:
        parcel = shipment.content(b"a" * 1000)
        (path, _), *_ = arrivals(client, parcel)
        for damage in (b"b" * 1000, b"a" * 10, b""):
            Path(path).write_bytes(damage)
            client.run(lambda: __import__("infra.shipping").shipping._CHECKED.clear())  # as in a later process
            assert {data for _, data in arrivals(client, parcel)} == {b"a" * 1000}
    assert [entry for entry in Path(path).parent.iterdir() if entry.name.startswith("tmp")] == []


def test_an_empty_file_arrives(client: Client) -> None:
    with Shipment(client) as shipment:
        assert {data for _, data in arrivals(client, shipment.content(b""))} == {b""}


def test_other_content_than_was_sent_is_refused(client: Client) -> None:
    with Shipment(client) as shipment:
        sent = shipment.content(b"one")
        forged = Parcel("0" * 64, 3, sent.blocks)
        with pytest.raises(Exception, match="has arrived with other content"):
            arrivals(client, forged)


def kill(client: Client, number: int) -> None:
    """Some of the two workers; back when there are two again that answer."""
    killed = list(client.run(os.getpid).values())[:number]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        answers = client.run(os.getpid, on_error="ignore").values()
        if len(answers) == 2 and not set(answers) & set(killed):
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_blocks_of_a_lost_worker_are_made_again(client: Client) -> None:
    with Shipment(client) as shipment:
        parcel = shipment.content(np.random.default_rng(1).bytes(3 * BLOCK))
        client.gather([client.submit(len, key, pure=False) for key in parcel.blocks])
        kill(client, 2)
        assert {len(data) for _, data in arrivals(client, parcel)} == {parcel.size}


def test_a_file_that_cannot_be_read_is_named(client: Client, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.pt cannot be read to be sent to workers: No such file"):
        Shipment(client).file(tmp_path / "none.pt")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package, a module that it imports, and a folder of modules without __init__.py."""
    for name, text in {
        "ownnet/__init__.py": "",
        "ownnet/nets.py": "import numpy\nfrom ownhelp import WIDTH\nfrom . import layers\ndef small(): return WIDTH",
        "ownnet/layers.py": "import ownspace.deep\n",
        "ownnet/sizes.txt": "3",
        "ownnet/__pycache__/nets.pyc": "",
        "ownnet/.hidden": "",
        "ownhelp.py": "import json\nWIDTH = 1\n",
        "ownspace/deep.py": "",
        "ownspace/data.bin": "0" * 100,
    }.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "code")
    return tmp_path / "code"


def test_own_packages_are_found_with_what_they_import(own: Path) -> None:
    mentioned = {
        "model": {"name": "ownnet.nets:small"},
        "more": ["torch.nn:Linear", "infra.victims:open_victim", "cnn"],
    }
    assert own_packages(mentioned) == {"ownnet", "ownhelp", "ownspace"}
    assert own_packages({"name": "torch.nn:Linear", "function": "nowhere:f", "n": 3, "text": "a: b"}) == set()
    contents = {
        name: zipfile.ZipFile(io.BytesIO(archive(name))).namelist() for name in ("ownnet", "ownhelp", "ownspace")
    }
    assert contents == {
        "ownnet": ["ownnet/__init__.py", "ownnet/layers.py", "ownnet/nets.py", "ownnet/sizes.txt"],
        "ownhelp": ["ownhelp.py"],
        "ownspace": ["ownspace/deep.py"],
    }
    assert archive("ownnet") == archive("ownnet")


def test_too_large_a_package_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_code, "MAX_BYTES", 50)
    with pytest.raises(RequestError, match=r"the package 'ownnet' has more than .* install it on them"):
        archive("ownnet")


def test_own_code_is_on_workers_within_the_block_and_as_it_is_now(client: Client, own: Path) -> None:
    def ask() -> set[int]:
        def small() -> int:
            import ownnet.nets

            return int(ownnet.nets.small())

        workers = list(client.nthreads())
        futures = [client.submit(small, workers=[worker], pure=False) for worker in workers]
        return {future.result(timeout=60) for future in futures}

    client.run(lambda path: sys.path.remove(path) if path in sys.path else None, str(own))
    with own_code.own_code(client, "ownnet.nets:small"):
        assert ask() == {1}
        kill(client, 1)
        assert ask() == {1}, "a worker that comes later has it too"
    (own / "ownhelp.py").write_text("WIDTH = 2\n")
    with own_code.own_code(client, "ownnet.nets:small"):
        assert ask() == {2}
    left = client.run(lambda: [entry for entry in sys.path if "deepzero-code" in entry])
    assert set(map(tuple, left.values())) == {()}


def test_blocks_are_small_enough_for_a_graph() -> None:
    """Dask warns of larger ones."""
    assert shipping.BLOCK < 10_000_000
