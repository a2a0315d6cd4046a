"""Google's storage, emulated on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

import pytest


@contextmanager
def emulated_bucket(name: str) -> Iterator[str]:
    """gs://NAME, empty, for gcsfs and tensorstore in this process and those that it starts."""
    import gcsfs
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        # One thread answers: tensorstore's 32 requests at once must find room to wait.
        patch.setattr(HTTPServer, "request_queue_size", 128)
        server.start()
        for variable, value in {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask Google about the bucket
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # tensorstore would ask Google for one
        }.items():
            patch.setenv(variable, value)
        gcsfs.GCSFileSystem.clear_instance_cache()  # those of another emulator
        yield f"gs://{name}"
        gcsfs.GCSFileSystem.clear_instance_cache()
    server.stop()
