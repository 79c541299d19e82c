"""A Google Cloud Storage server for tests, with the bucket `runs`: a script that prints its address.

A process of its own, since Arrow holds the interpreter while it opens a file there. The emulator knows no conditions,
so `ifGenerationMatch=0` is added here: of several writers at once, one wins.
"""

import threading
from functools import partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

LOCK = threading.RLock()
insert = objects._multipart_upload


def insert_unless_there(request, response, storage):
    with LOCK:
        if request.query.get("ifGenerationMatch") == ["0"]:
            try:
                storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
            except NotFound:
                pass
            else:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return None
        return insert(request, response, storage)


class OneAtATime(RequestHandler):
    """The storage in memory is no friend of threads; connections that idle must not block others."""

    def log_message(self, *arguments):
        pass


def locked(method):
    def handle(self):
        with LOCK:
            method(self)

    return handle


for name in ("do_GET", "do_POST", "do_PUT", "do_DELETE", "do_PATCH"):
    setattr(OneAtATime, name, locked(getattr(RequestHandler, name)))

if __name__ == "__main__":
    objects._multipart_upload = insert_unless_there
    storage = Storage(use_memory_fs=True)
    storage.create_bucket("runs", {"id": "runs", "name": "runs"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(OneAtATime, storage))
    server.daemon_threads = True
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
