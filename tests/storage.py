"""A local emulator of Google Cloud Storage: the part of its JSON API that gcsfs and TensorStore use.

Every object has a generation, which is its time in microseconds, and a request for another generation fails, as in the
real service.
"""

import datetime
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import fsspec

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
LIST = re.compile(r"/storage/v1/b/([^/]+)/o/?")
UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o/?")
REWRITE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")


class _Storage(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}  # (bucket, name) -> generation, content
        self.generation, self.lock = 0, threading.Lock()

    def write(self, key: tuple[str, str], content: bytes) -> None:
        self.generation = max(self.generation + 1, time.time_ns() // 1000)
        self.objects[key] = self.generation, content


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: separate packets wait 40 ms for an acknowledgement
    server: _Storage

    def log_message(self, *_: object) -> None:
        """Suppresses logging."""

    def do_GET(self) -> None:
        with self.server.lock:
            path, query = self._request()
            if match := OBJECT.fullmatch(path):
                key = match[1], unquote(match[2])
                if status := self._precondition_status(key, query):
                    self._respond(status)
                elif key not in self.server.objects:
                    self._respond(404, {"error": {"code": 404, "message": "Not Found"}})
                elif query.get("alt") == "media" or path.startswith("/download"):
                    self._content(*self.server.objects[key])
                else:
                    self._respond(200, self._metadata(key))
            elif match := LIST.fullmatch(path):
                self._respond(200, self._listing(match[1], query))
            else:
                self._respond(200, {"kind": "storage#bucket", "name": path.rpartition("/")[2]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            path, query = self._request()
            if match := UPLOAD.fullmatch(path):
                name, content = _split_multipart(body) if query["uploadType"] == "multipart" else (query["name"], body)
                key = match[1], name
                if query["uploadType"] == "resumable" and "session" not in query:
                    session = f"?uploadType=resumable&session=1&name={quote(key[1], safe='')}"
                    self.extra = {"Location": f"{self._address()}{path}{session}"}
                    self._respond(200)
                elif "session" in query and not self.headers["Content-Range"].startswith(("bytes 0-", "bytes */0")):
                    self._respond(501)  # uploads in several chunks
                elif status := self._precondition_status(key, query):
                    self._respond(status)
                else:
                    self.server.write(key, content)
                    self._respond(200, self._metadata(key))
            elif match := REWRITE.fullmatch(path):
                source, key = (match[1], unquote(match[2])), (match[3], unquote(match[4]))
                self.server.write(key, self.server.objects[source][1])
                self._respond(200, {"done": True, "resource": self._metadata(key)})
            elif path.startswith("/batch"):
                self._batch(body)
            else:
                self._respond(501)

    def do_DELETE(self) -> None:
        with self.server.lock:
            path, query = self._request()
            match = OBJECT.fullmatch(path)
            key = match[1], unquote(match[2])
            if status := self._precondition_status(key, query):
                self._respond(status)
            else:
                self._respond(204 if self.server.objects.pop(key, None) else 404)

    def _request(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, dict(parse_qsl(url.query, keep_blank_values=True))

    def _precondition_status(self, key: tuple[str, str], query: dict[str, str]) -> int:
        """Returns the error status if the object does not have the requested generation, else 0."""
        current = self.server.objects.get(key, (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != current:
            return 412
        return 304 if current and query.get("ifGenerationNotMatch") == str(current) else 0

    def _metadata(self, key: tuple[str, str]) -> dict[str, object]:
        generation, content = self.server.objects[key]
        link = f"{self._address()}/download/storage/v1/b/{key[0]}/o/{quote(key[1], safe='')}?alt=media"
        written = datetime.datetime.fromtimestamp(generation / 1e6, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "kind": "storage#object", "bucket": key[0], "name": key[1], "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "mediaLink": link,
            "timeCreated": written, "updated": written,
        }  # fmt: skip

    def _listing(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            rest = key[1].removeprefix(prefix)
            if key[0] != bucket or not key[1].startswith(prefix):
                continue
            if not query.get("startOffset", "") <= key[1] < query.get("endOffset", "\U0010ffff"):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._metadata(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _batch(self, body: bytes) -> None:
        """Responds to a batch request, all of whose requests are deletions."""
        responses = []
        for path in re.findall(rb"DELETE (\S+)", body):
            match = OBJECT.search(urlsplit(path.decode()).path)
            found = self.server.objects.pop((match[1], unquote(match[2])), None)
            status = "204 No Content" if found else "404 Not Found"
            responses.append(f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        self._respond(200, "".join(responses) + "--batch--", "multipart/mixed; boundary=batch")

    def _content(self, generation: int, content: bytes) -> None:
        byte_range = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        status, body = 200, content
        self.extra = {"x-goog-generation": str(generation)}
        if byte_range:
            first = int(byte_range[1]) if byte_range[1] else max(len(content) - int(byte_range[2]), 0)
            last = min(int(byte_range[2]) if byte_range[1] and byte_range[2] else len(content) - 1, len(content) - 1)
            if first >= len(content):
                self._respond(416)
                return
            status, body = 206, content[first : last + 1]
            self.extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._respond(status, body, "application/octet-stream")

    def _respond(self, status: int, content: object = b"", kind: str = "application/json") -> None:
        text = content if isinstance(content, (bytes, str)) else json.dumps(content)
        body = text if isinstance(text, bytes) else text.encode()
        self.send_response(status)
        for name, value in getattr(self, "extra", {}).items():
            self.send_header(name, value)
        self.extra = {}
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def asked_by_clients(address: str) -> Iterator[None]:
    """Points the client libraries of this process and its subprocesses to the emulator at an address."""
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would query Google for the bucket type
    }
    anonymous = {
        protocol: {**fsspec.config.conf.get(protocol, {}), "token": "anon", "project": "none"}
        for protocol in ("gs", "gcs")
    }
    with mock.patch.dict(os.environ, environment), mock.patch.dict(fsspec.config.conf, anonymous):
        yield


def _split_multipart(body: bytes) -> tuple[str, bytes]:
    """Returns the name and the content of a multipart upload."""
    boundary, rest = body.split(b"\n", 1)
    metadata, content = rest.split(b"\n" + boundary + b"\n", 1)
    metadata, content = (part.split(b"\n\n", 1)[1] for part in (metadata, content))
    return json.loads(metadata)["name"], content.removesuffix(b"\n" + boundary + b"--")


@contextmanager
def serving() -> Iterator[str]:
    """Serves initially empty buckets and yields the address."""
    server = _Storage()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
