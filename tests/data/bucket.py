"""Real object stores on this machine, with one bucket: S3 (moto's server), Google Cloud Storage (an emulator)."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest


class Bucket(ABC):
    """`url` is the bucket's; the libraries find server and credentials in the environment, as a user's would.

    `endpoint` is the variable that names the server, `asks` how many connections a try to open a file makes; the other
    class variables are what the library says of an object or bucket that is missing, and of a server that is away.
    """

    scheme: ClassVar[str]
    endpoint: ClassVar[str]
    asks: ClassVar[int]
    no_object: ClassVar[str]
    no_bucket: ClassVar[str]
    away: ClassVar[str]

    def __init__(self, files: Any, name: str) -> None:
        self.files, self.name = files, name
        self.url = f"{self.scheme}://{name}"
        self.forget()

    def put(self, folder: Path, name: str) -> None:
        self.files.put(str(folder), f"{self.url}/{name}", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.url}/{name}", content)

    def remove(self, name: str) -> None:
        self.files.rm_file(f"{self.url}/{name}")

    def forget(self) -> None:
        """The next file system looks into the environment anew: fsspec keeps those that it made."""
        type(self.files).clear_instance_cache()

    @abstractmethod
    def forbid(self, name: str) -> None:
        """From now on nobody may read this object: the server answers 403."""

    @abstractmethod
    def stop(self) -> None:
        """From now on nobody listens."""


class S3Bucket(Bucket):
    scheme, endpoint, asks = "s3", "AWS_ENDPOINT_URL", 1
    no_object, no_bucket = "The specified key does not exist", "The specified bucket does not exist"
    away = "Could not connect to the endpoint"

    def __init__(self, name: str, environment: pytest.MonkeyPatch) -> None:
        s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
        moto = pytest.importorskip("moto.server", reason="moto, flask and flask-cors are not installed (extra dev)")
        self._server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            environment.setenv(variable, "/dev/null")
        for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            environment.delenv(variable, raising=False)
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "tests")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        super().__init__(s3fs.S3FileSystem(skip_instance_cache=True), name)
        self.files.mkdir(name)

    def forbid(self, name: str) -> None:
        resource = f"arn:aws:s3:::{self.name}/{name}"
        statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": resource}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.files.call_s3("put_bucket_policy", Bucket=self.name, Policy=json.dumps(policy))

    def stop(self) -> None:
        self._server.stop()


class GoogleBucket(Bucket):
    scheme, endpoint, asks = "gs", "STORAGE_EMULATOR_HOST", 2
    no_object = no_bucket = "not found: b/"
    away = "Cannot connect to host"

    def __init__(self, name: str, environment: pytest.MonkeyPatch, folder: Path) -> None:
        pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra gs)")
        pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed (extra dev)")
        from ask_dist.data.places import filesystem
        from tests.data.google_storage import GoogleServer

        self.server = GoogleServer(name)
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        environment.setenv("STORAGE_EMULATOR_HOST", self.server.url)
        environment.setenv("CLOUDSDK_CONFIG", str(folder))
        environment.setenv("NO_GCE_CHECK", "true")  # nobody answers there, and google-auth would wait for it
        environment.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        super().__init__(filesystem(f"gs://{name}")[0], name)

    def forbid(self, name: str) -> None:
        self.server.forbidden.add(name)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.server.shutdown()
            self._thread.join()
            self.server.server_close()


@contextmanager
def serving_bucket(scheme: str, name: str, environment: pytest.MonkeyPatch, folder: Path) -> Iterator[Bucket]:
    """A bucket of that name, empty, named by the environment alone; the test is skipped without the packages for it.

    Args:
        scheme: "s3" or "gs".
        name: of the bucket.
        environment: where server and credentials are told.
        folder: an empty one, where no credentials of this machine's user lie.
    """
    bucket = S3Bucket(name, environment) if scheme == "s3" else GoogleBucket(name, environment, folder)
    try:
        yield bucket
    finally:
        bucket.stop()
        bucket.forget()
