"""A server with the API of Google Cloud Storage and the bucket `runs`. It prints its address and runs until killed.

It is an emulator of the API, to which this adds what the tests are about: `ifGenerationMatch=0` is honoured, and what
is asked of objects whose names begin with `flaky` or `lost` fails at first. It is a process of its own, since Arrow
keeps Python's lock while it opens a file.
"""

import io
import logging
import re
import threading
from collections import Counter
from functools import partial
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

FAILURES = 2  # number of requests of a kind to an object
one_at_a_time = threading.Lock()
met = Counter()


class Refused(Exception):
    """412: the object exists."""


class OnceStorage(Storage):
    """Check the condition that no object has this name when the object is created, in one step."""

    conditional = False  # the current request

    def create_file(self, bucket_name, file_name, *arguments, **keywords):
        if self.conditional:
            try:
                self.get_file_obj(bucket_name, file_name)
            except NotFound:
                pass
            else:
                raise Refused
        return super().create_file(bucket_name, file_name, *arguments, **keywords)


class Handler(RequestHandler):
    def handle_one(self, answer):
        """Reading the request and sending the response may take long, if a test has stopped the client."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = re.search(rb"[\w-]+(?:/|%2F)(flaky|lost)", self.path.encode() + body[:1000])
        failing = False
        self.rfile, socket, self.wfile = io.BytesIO(body), self.wfile, io.BytesIO()
        with one_at_a_time:
            if fault and self.command != "PUT":  # the emulator cannot continue an upload in pieces
                met[self.command, fault[0]] += 1
                failing = met[self.command, fault[0]] <= FAILURES
            if failing and fault[1] == b"flaky":
                self.send_error(503)
            else:
                self.storage.conditional = "ifGenerationMatch=0" in self.path
                try:
                    answer()
                except Refused:
                    self.wfile = io.BytesIO()
                    self.send_error(412)
        if not (failing and fault[1] == b"lost"):
            socket.write(self.wfile.getvalue())
        self.wfile = socket

    def do_GET(self):
        self.handle_one(super().do_GET)

    def do_POST(self):
        self.handle_one(super().do_POST)

    def do_PUT(self):
        self.handle_one(super().do_PUT)

    def do_DELETE(self):
        self.handle_one(super().do_DELETE)

    def log_message(self, format, *arguments):
        pass


if __name__ == "__main__":
    logging.disable()
    storage = OnceStorage(use_memory_fs=True)
    create_bucket("runs", storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
    print("{}:{}".format(*server.server_address), flush=True)
    server.serve_forever()
