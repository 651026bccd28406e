"""Shards in an object store that this file starts: reading, order, workers, faults, secrets.

pytest tests/test_remote.py
"""

import logging
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pyarrow.fs as pafs
import pytest
import torch

from data import shard_files
from data.pairs import DataConfig, LabelConfig, open_pairs
from data.shard_files import Storage
from data.stream import stream
from tests import tiny_data as tiny

server = pytest.importorskip("moto.server", reason='the store of the test: pip install ".[dev]"')
SECRET = "a-secret-that-nobody-may-read"


def config(path, **options) -> DataConfig:
    labels = LabelConfig(material_source="none")
    return DataConfig(**{"path": str(path), "size": 16, "labels": labels, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 7, 11 and 2 rows."""
    folder, first = tmp_path_factory.mktemp("remote") / "set", 0
    for part, count in enumerate((7, 11, 2)):
        columns = tiny.rows(count, first=first, split=tiny.by_tens)
        tiny.write(folder / f"part{part}.parquet", columns, row_group_size=3)
        first += count
    return folder


@pytest.fixture(scope="module")
def endpoint(folder):
    """Address of a running store with the shards in bucket `pairs`, below set/."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    store = pafs.S3FileSystem(
        access_key="test",
        secret_key=SECRET,
        endpoint_override=f"{host}:{port}",
        scheme="http",
        allow_bucket_creation=True,
    )
    store.create_dir("pairs")
    for path in folder.iterdir():
        with store.open_output_stream(f"pairs/set/{path.name}") as file:
            file.write(path.read_bytes())
    yield f"{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(shard_files, "WAITS", (0.01, 0.01))


def uri(endpoint: str, path: str = "set") -> str:
    return f"s3://pairs/{path}?endpoint_override={endpoint}&scheme=http&region=us-east-1"


@pytest.mark.parametrize("path", ["set", "set/", "set/part*.parquet", "set/part[0-2].parquet"])
def test_a_uri_gives_the_pairs_of_the_folder(endpoint, folder, path):
    here, there = (open_pairs(config(p), "train") for p in (folder, uri(endpoint, path)))
    assert there.names == here.names
    for i in (0, 9, 15):
        assert torch.equal(there[i]["visible"], here[i]["visible"])
    assert there.where(0) == "s3://pairs/set/part0.parquet, row 0, 'pair_0000'"


def test_the_endpoint_may_be_in_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    assert len(open_pairs(config("s3://pairs/set?region=us-east-1"), "val")) == 2


def test_every_process_opens_the_store_for_itself(endpoint, monkeypatch):
    storage = Storage(uri(endpoint))
    first = storage.fs
    assert storage.fs is first
    monkeypatch.setattr(shard_files.os, "getpid", lambda: 1)
    assert storage.fs is not first


@pytest.mark.parametrize("window", [0, 5])
def test_workers_read_the_store_as_one_process_reads_the_folder(endpoint, folder, window):
    options = dict(shuffle_window=window, cache="none")
    here = stream(open_pairs(config(folder, **options), "train"), 3, seed=4)
    pairs = open_pairs(config(uri(endpoint), **options), "train")
    there = stream(pairs, 3, seed=4, num_workers=2)
    for _ in range(8):
        a, b = next(here), next(there)
        assert a["name"] == b["name"] and torch.equal(a["infrared"], b["infrared"])


def test_what_a_remote_order_costs_is_said(endpoint):
    notes = "\n".join(open_pairs(config(uri(endpoint)), "train").notes)
    assert "data.shuffle_window=0" in notes and "data.shuffle_window=4096" in notes
    notes = "\n".join(open_pairs(config(uri(endpoint), shuffle_window=5), "train").notes)
    assert "windows of 5 rows" in notes and "4096" not in notes


@pytest.mark.parametrize(
    "path, message",
    [
        ("pairs/empty", "no such file or folder"),
        ("nowhere/set", "no such file or folder"),
        ("pairs/set/*.csv", "no .parquet file"),
    ],
)
def test_an_empty_prefix_is_one_sentence_with_the_uri(endpoint, path, message):
    wrong = f"s3://{path}?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    with pytest.raises(ValueError, match=message) as raised:
        open_pairs(config(wrong), "train")
    assert wrong in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_shard_that_vanishes_from_the_store_is_named_with_the_row(endpoint, folder):
    store = Storage(uri(endpoint)).fs
    with store.open_output_stream("pairs/vanishing/a.parquet") as file:
        file.write((folder / "part1.parquet").read_bytes())
    pairs = open_pairs(config(uri(endpoint, "vanishing"), cache="none"), "train")
    pairs.source.reader._reset()  # as in a worker that has not opened it
    store.delete_file("pairs/vanishing/a.parquet")
    with pytest.raises(
        ValueError, match=r"s3://pairs/vanishing/a.parquet, row 6, 'pair_0013': cannot be"
    ):
        pairs.pair(4)


def test_a_lost_connection_is_opened_again(endpoint):
    class Lost:
        def read_row_group(self, *_, **__):
            raise OSError("AWS Error NETWORK_CONNECTION: curlCode: 56, Failure when receiving data")

    pairs = open_pairs(config(uri(endpoint), cache="none"), "train")
    pairs.source.reader._reset()
    pairs.source.reader.handles[0] = Lost()
    assert (pairs.pair(2).infrared == tiny.infrared(2)).all()


@contextmanager
def answering(status: int, code: str):
    """A store that answers every request like this; the number of requests is in `count`."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    store = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{store.server_port}", requests
    finally:
        store.shutdown()
        store.server_close()


def test_a_uri_without_permission_is_one_sentence_at_once():
    with answering(403, "AccessDenied") as (address, requests):
        with pytest.raises(ValueError, match="do not permit it") as raised:
            open_pairs(config(uri(address)), "train")
        assert len(requests) <= 2
    assert uri(address) in str(raised.value) and len(str(raised.value).splitlines()) == 1
    assert SECRET not in str(raised.value)


def test_a_store_that_does_not_answer_is_one_sentence(monkeypatch):
    address, tried = "127.0.0.1:9", []

    def no_answer(storage):  # what Arrow says after 6 seconds
        tried.append(storage)
        raise OSError("When resolving: AWS Error NETWORK_CONNECTION:\n curlCode: 7, no connection.")

    monkeypatch.setattr(Storage, "_open", no_answer)
    with pytest.raises(ValueError, match="cannot be opened") as raised:
        open_pairs(config(uri(address)), "train")
    assert uri(address) in str(raised.value) and len(str(raised.value).splitlines()) == 1
    assert len(tried) == 3


@pytest.mark.parametrize("failures, works", [(2, True), (3, False)])
def test_an_error_of_the_network_is_tried_again_twice(failures, works):
    left = [OSError("AWS Error NETWORK_CONNECTION: curlCode: 28, Timeout")] * failures

    def action():
        if left:
            raise left.pop()
        return "done"

    storage = Storage("s3://pairs/set")
    if works:
        assert storage.attempt(action) == "done"
    else:
        with pytest.raises(OSError, match="curlCode"):
            storage.attempt(action)
    assert not left


@pytest.mark.parametrize(
    "wrong",
    [
        f"s3://test:{SECRET}@pairs/set",
        f"s3://test:{SECRET[:5]}/{SECRET[5:]}@pairs/set",
        f"abfs://pairs@account/set?account_key={SECRET}",
        f"abfss://pairs/set?x=1&sas_token={SECRET}",
    ],
)
def test_a_password_in_a_uri_is_refused_and_not_repeated(wrong):
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as raised:
        config(wrong)
    assert SECRET[5:] not in str(raised.value)


@pytest.mark.parametrize(
    "right", ["gs://anonymous@bucket/set", "hdfs://user@host:8020/a", "s3://b/a@c?region=eu"]
)
def test_a_uri_without_password_is_accepted(right):
    assert config(right).path == right
