"""An object server of S3's protocol on this machine, for tests that write to URLs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "shards"


@contextmanager
def object_server(patch: pytest.MonkeyPatch, port: int = 0) -> Iterator[str]:
    """Yield a URL below which nothing is. The environment has the server's address and credentials meanwhile."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        host, found = server.get_host_and_port()
        set_endpoint(patch, f"http://{host}:{found}")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        system = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        if not system.exists(BUCKET):  # servers of one process share their buckets
            system.mkdir(BUCKET)
        yield f"s3://{BUCKET}/{uuid.uuid4().hex}"
        s3fs.S3FileSystem.clear_instance_cache()
    finally:
        server.stop()


def set_endpoint(patch: pytest.MonkeyPatch, address: str) -> None:
    """Set the variables of a server that runs, or will run, at an address."""
    values = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in {**values, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(name, value)
