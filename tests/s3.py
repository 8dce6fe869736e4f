"""An S3 server on this machine (moto), where it is installed, and what a client of it is told."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

__all__ = ["HAS_S3", "NEEDS_S3", "SECRET", "make_bucket", "s3_environment", "s3_server"]

HAS_S3 = find_spec("s3fs") is not None and find_spec("moto") is not None
NEEDS_S3 = "needs s3fs and moto[server]: pip install s3fs 'moto[server]'"
SECRET = "canary-secret-0815"


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A server in a process of its own, its log in a folder; the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, (folder / "moto.log").read_text(encoding="utf-8")
                    assert time.monotonic() < deadline
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def s3_environment(address: str) -> dict[str, str]:
    """The variables by which any client finds the server, and a key that is nobody's."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "canary-0815",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


def make_bucket(address: str, name: str) -> None:
    """Make a bucket, which nobody may have made before."""
    urllib.request.urlopen(urllib.request.Request(f"{address}/{name}", method="PUT"), timeout=60).close()
