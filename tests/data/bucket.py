"""A real S3 server on this machine (moto's), with one bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Bucket:
    """`url` is the bucket's; s3fs and botocore find server and credentials in the environment, as a user's would."""

    def __init__(self, server: Any, files: Any, name: str) -> None:
        self._server, self._files, self._name = server, files, name
        self.url = f"s3://{name}"
        files.mkdir(name)

    def put(self, folder: Path, name: str) -> None:
        self._files.put(str(folder), f"{self.url}/{name}", recursive=True)

    def write(self, name: str, content: bytes) -> None:
        self._files.pipe_file(f"{self.url}/{name}", content)

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self.url}/{name}")

    def forbid(self, name: str) -> None:
        """From now on nobody may read this object: the server answers 403."""
        resource = f"arn:aws:s3:::{self._name}/{name}"
        statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": resource}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self._files.call_s3("put_bucket_policy", Bucket=self._name, Policy=json.dumps(policy))

    def forget(self) -> None:
        """The next file system looks into the environment anew: fsspec keeps those that it made."""
        type(self._files).clear_instance_cache()

    def stop(self) -> None:
        """From now on nobody listens."""
        self._server.stop()


@contextmanager
def serving_bucket(name: str, environment: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket of that name, empty, named by the environment alone; the test is skipped without s3fs and moto."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra s3)")
    moto = pytest.importorskip("moto.server", reason="moto, flask and flask-cors are not installed (extra dev)")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        environment.setenv(variable, "/dev/null")
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        environment.delenv(variable, raising=False)
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    environment.setenv("AWS_ACCESS_KEY_ID", "tests")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = Bucket(server, s3fs.S3FileSystem(skip_instance_cache=True), name)
    bucket.forget()
    try:
        yield bucket
    finally:
        bucket.stop()
        bucket.forget()
