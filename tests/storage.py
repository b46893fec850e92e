"""A stand-in for Google Cloud Storage on this machine: the part of its JSON API that gcsfs and TensorStore speak.

Every object has a generation, and a request that asks for another one than it is fails, as there.
"""

import itertools
import json
import os
import re
import threading
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
        self.generations, self.lock = itertools.count(1), threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: apart, each answer waits 40 ms for an acknowledgement
    server: _Storage

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        with self.server.lock:
            path, query = self._asked()
            if match := OBJECT.fullmatch(path):
                key = match[1], unquote(match[2])
                if status := self._refused(key, query):
                    self._answer(status)
                elif key not in self.server.objects:
                    self._answer(404, {"error": {"code": 404, "message": "Not Found"}})
                elif query.get("alt") == "media" or path.startswith("/download"):
                    self._content(*self.server.objects[key])
                else:
                    self._answer(200, self._described(key))
            elif match := LIST.fullmatch(path):
                self._answer(200, self._listed(match[1], query))
            else:
                self._answer(200, {"kind": "storage#bucket", "name": path.rpartition("/")[2]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            path, query = self._asked()
            if match := UPLOAD.fullmatch(path):
                name, content = _of_parts(body) if query["uploadType"] == "multipart" else (query["name"], body)
                key = match[1], name
                if query["uploadType"] == "resumable" and "session" not in query:
                    session = f"?uploadType=resumable&session=1&name={quote(key[1], safe='')}"
                    self.extra = {"Location": f"{self._address()}{path}{session}"}
                    self._answer(200)
                elif "session" in query and not self.headers["Content-Range"].startswith(("bytes 0-", "bytes */0")):
                    self._answer(501)  # files of several pieces
                elif status := self._refused(key, query):
                    self._answer(status)
                else:
                    self.server.objects[key] = next(self.server.generations), content
                    self._answer(200, self._described(key))
            elif match := REWRITE.fullmatch(path):
                source, key = (match[1], unquote(match[2])), (match[3], unquote(match[4]))
                self.server.objects[key] = next(self.server.generations), self.server.objects[source][1]
                self._answer(200, {"done": True, "resource": self._described(key)})
            elif path.startswith("/batch"):
                self._batch(body)
            else:
                self._answer(501)

    def do_DELETE(self) -> None:
        with self.server.lock:
            path, query = self._asked()
            match = OBJECT.fullmatch(path)
            key = match[1], unquote(match[2])
            if status := self._refused(key, query):
                self._answer(status)
            else:
                self._answer(204 if self.server.objects.pop(key, None) else 404)

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, dict(parse_qsl(url.query, keep_blank_values=True))

    def _refused(self, key: tuple[str, str], query: dict[str, str]) -> int:
        """Returns the status where the object is not of the generation that is asked for, else 0."""
        now = self.server.objects.get(key, (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            return 412
        return 304 if now and query.get("ifGenerationNotMatch") == str(now) else 0

    def _described(self, key: tuple[str, str]) -> dict[str, object]:
        generation, content = self.server.objects[key]
        link = f"{self._address()}/download/storage/v1/b/{key[0]}/o/{quote(key[1], safe='')}?alt=media"
        return {
            "kind": "storage#object", "bucket": key[0], "name": key[1], "size": str(len(content)),
            "generation": str(generation), "metageneration": "1", "mediaLink": link,
            "timeCreated": "2020-01-01T00:00:00Z", "updated": "2020-01-01T00:00:00Z",
        }  # fmt: skip

    def _listed(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
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
                items.append(self._described(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _batch(self, body: bytes) -> None:
        """Answers several requests in one, all of which delete."""
        answers = []
        for path in re.findall(rb"DELETE (\S+)", body):
            match = OBJECT.search(urlsplit(path.decode()).path)
            found = self.server.objects.pop((match[1], unquote(match[2])), None)
            status = "204 No Content" if found else "404 Not Found"
            answers.append(f"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        self._answer(200, "".join(answers) + "--batch--", "multipart/mixed; boundary=batch")

    def _content(self, generation: int, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        status, sent = 200, content
        self.extra = {"x-goog-generation": str(generation)}
        if asked:
            first = int(asked[1]) if asked[1] else max(len(content) - int(asked[2]), 0)
            last = min(int(asked[2]) if asked[1] and asked[2] else len(content) - 1, len(content) - 1)
            if first >= len(content):
                self._answer(416)
                return
            status, sent = 206, content[first : last + 1]
            self.extra["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(status, sent, "application/octet-stream")

    def _answer(self, status: int, said: object = b"", kind: str = "application/json") -> None:
        body = said if isinstance(said, bytes) else (said if isinstance(said, str) else json.dumps(said)).encode()
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
    """Has the client libraries of this process, and of those that it starts, ask the stand-in at an address."""
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks Google, not the stand-in, what kind it is
    }
    anonymous = {
        protocol: {**fsspec.config.conf.get(protocol, {}), "token": "anon", "project": "none"}
        for protocol in ("gs", "gcs")
    }
    with mock.patch.dict(os.environ, environment), mock.patch.dict(fsspec.config.conf, anonymous):
        yield


def _of_parts(body: bytes) -> tuple[str, bytes]:
    """Returns the name and the content of an object that is uploaded with its metadata."""
    boundary, rest = body.split(b"\n", 1)
    metadata, content = rest.split(b"\n" + boundary + b"\n", 1)
    metadata, content = (part.split(b"\n\n", 1)[1] for part in (metadata, content))
    return json.loads(metadata)["name"], content.removesuffix(b"\n" + boundary + b"--")


@contextmanager
def serving() -> Iterator[str]:
    """Serves buckets, which are empty at first, and yields the address."""
    server = _Storage()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
