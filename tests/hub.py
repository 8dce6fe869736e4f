"""The few requests of the Hugging Face hub that files in a data set's repository need, on this machine."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["REPOSITORY", "Hub", "running_hub"]

REPOSITORY = "team/distilled"
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Hub:
    """One repository: its files, and the paths that each commit changed."""

    def __init__(self) -> None:
        self.address = ""
        self.files: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.before_a_commit: Callable[[], None] = lambda: None

    @property
    def head(self) -> str:
        """What the last commit is known by."""
        return f"{len(self.commits):040x}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Carry out the operations of a commit."""
        changed = []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                assert line["key"] == "header", line["key"]
                continue
            changed.append(value["path"])
        self.commits.append(changed)

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder."""
        start, found = f"{folder}/" if folder else "", {}
        for path, data in sorted(self.files.items()):
            if not path.startswith(start):
                continue
            parts = path[len(start) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                above = start + "/".join(parts[:depth])
                found[above] = {"type": "directory", "path": above, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                oid = hashlib.sha1(data).hexdigest()
                found[path] = {"type": "file", "path": path, "size": len(data), "oid": oid}
        return list(found.values())


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        hub.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if path.startswith(f"/datasets/{REPOSITORY}/resolve/main/"):
            self._send_file(path.partition("/resolve/main/")[2])
        elif path.startswith(f"/api/datasets/{REPOSITORY}/tree/main"):
            found = self.server.hub.tree(
                path.partition("/tree/main")[2].strip("/"),
                recursive="recursive=true" in url.query.lower(),
            )
            self._send_json(found) if found else self._missing("EntryNotFound")
        elif path.split("/revision/")[0] == f"/api/datasets/{REPOSITORY}":
            head = self.server.hub.head
            self._send_json({"_id": "1", "id": REPOSITORY, "sha": head, "private": False, "tags": []})
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            self._send_json({"files": files})
        elif self.path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines() if line])
        else:
            self._missing("EntryNotFound")

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub, [header] = self.server.hub, [line["value"] for line in lines if line["key"] == "header"]
        hub.before_a_commit()
        if header.get("parentCommit", hub.head) != hub.head:
            self._send(412, b'{"error": "the head has moved"}', "application/json")
            return
        hub.commit(lines)
        url = f"{hub.address}/datasets/{REPOSITORY}/commit/{hub.head}"
        self._send_json({"success": True, "commitOid": hub.head, "commitUrl": url, "hookOutput": ""})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send_file(self, path: str) -> None:
        if path not in self.server.hub.files:
            self._missing("EntryNotFound")
            return
        data = self.server.hub.files[path]
        if (wanted := _RANGE.fullmatch(self.headers.get("Range", ""))) is not None:
            self._send(206, data[int(wanted[1]) : int(wanted[2]) + 1], "application/octet-stream")
        else:
            self._send(200, data, "application/octet-stream")

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", "application/json", {"X-Error-Code": code})

    def _send(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub with one empty repository."""
    hub = Hub()
    with _Server(hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
