"""An S3 storage root: is the endpoint there, are the keys accepted, and is everything allowed that a run does?

Plain boto3 and not s3fs, because its errors keep the server's own code. Endpoint and keys are those that s3fs uses.
"""

from __future__ import annotations

import os
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx

from components import storage
from components.doctor.check import NO_ANSWER, REQUEST_SECONDS, Check, ask, clock_check, explained

_STEPS_SECONDS = 8.0  # after which no further step is begun, so that the probe's removal fits into the limit of all checks
_CONTENT = b"sae doctor: this file may be deleted\n"
_REFUSED = (409, 412)  # of a put with If-None-Match where something is there
_ANOTHER_SERVER = "Use another S3 server or version: a run relies on this (SeaweedFS 4.48 is known to do it)."
_KEYS = {
    "InvalidAccessKeyId": "The server does not know this AWS_ACCESS_KEY_ID: set the one that it gave you.",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: set the right pair.",
    "ExpiredToken": "The session token has expired: fetch new keys, and set AWS_SESSION_TOKEN with them.",
    "InvalidToken": "AWS_SESSION_TOKEN is not valid: fetch new keys, or unset it where the keys need none.",
    "RequestTimeTooSkewed": "Set this machine's clock (`timedatectl set-ntp true`): S3 takes no request over 15 minutes off.",
}
_NO_KEYS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
_REGION = "Set AWS_DEFAULT_REGION to the region of the bucket."
_KEYS |= {"NoCredentialsError": _NO_KEYS, "PartialCredentialsError": _NO_KEYS}
_KEYS |= {"PermanentRedirect": _REGION, "AuthorizationHeaderMalformed": _REGION}
_RIGHTS = {
    "list": "s3:ListBucket",
    "write": "s3:PutObject",
    "read": "s3:GetObject",
    "delete": "s3:DeleteObject",
    "put if absent": "s3:PutObject",
}


def s3_checks(root: str) -> Iterator[Check]:
    """Endpoint, keys, bucket and rights of an `s3://bucket/prefix`; the probe object is removed whatever happens."""
    bucket, _, prefix = storage.resolve(root)[1].partition("/")
    client = _client(root)
    endpoint = client.meta.endpoint_url
    try:
        trusted = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        answer = ask(endpoint, httpx.Client(verify=trusted))
    except (*NO_ANSWER, OSError) as error:
        advice = "Start the S3 server or correct its address: AWS_ENDPOINT_URL, or `endpoint_url` in ~/.aws/config."
        yield Check("storage", "endpoint", "failure", f"{endpoint}: {explained(error)}", advice)
        yield Check("storage", "rights", "skipped", "the endpoint does not answer")
        return
    yield Check("storage", "endpoint", "ok", f"{endpoint} answers in {answer.seconds * 1e3:.0f} ms")
    yield from clock_check("S3", answer)
    yield from _Probe(client, bucket, prefix.rstrip("/")).checks()


def _client(root: str) -> Any:
    import boto3  # type: ignore[import-untyped]
    from botocore import UNSIGNED  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    filesystem = storage.resolve(root)[0]
    named = {
        "endpoint_url": filesystem.endpoint_url,
        "aws_access_key_id": filesystem.key,
        "aws_secret_access_key": filesystem.secret,
        "aws_session_token": filesystem.token,
        "use_ssl": filesystem.use_ssl,
        **filesystem.client_kwargs,
    }
    settings = {
        **filesystem.config_kwargs,
        "connect_timeout": REQUEST_SECONDS,
        "read_timeout": REQUEST_SECONDS,
        "retries": {"total_max_attempts": 1},
        **({"signature_version": UNSIGNED} if filesystem.anon else {}),
    }
    given = {name: value for name, value in named.items() if value is not None}
    return boto3.session.Session().client("s3", config=Config(**settings), **given)


class _Probe:
    """The steps of a run with one small object, each of which may be refused."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix
        self.key = "/".join(filter(None, [prefix, f".sae-doctor-{uuid.uuid4().hex[:12]}"]))
        self.deadline = time.monotonic() + _STEPS_SECONDS
        self.gone = False

    def checks(self) -> Iterator[Check]:
        listed = self._step("list", self._list)
        code = listed.found.partition(":")[0]
        if code in _KEYS:
            yield Check("storage", "keys", "failure", listed.found, _KEYS[code])
            yield Check("storage", "rights", "skipped", "the keys are not accepted")
            return
        if code == "NoSuchBucket":
            yield Check("storage", "keys", "ok", "accepted")
            advice = f"Make the bucket '{self.bucket}' (`aws s3 mb s3://{self.bucket}`), or correct storage.root."
            yield Check("storage", "bucket", "failure", f"there is no bucket '{self.bucket}'", advice)
            yield Check("storage", "rights", "skipped", "there is no bucket to try them on")
            return
        if listed.status != "ok" and code not in ("AccessDenied", "403"):
            yield listed
            yield Check("storage", "rights", "skipped", "the server does not answer as S3 does")
            return
        yield Check("storage", "keys", "ok", "accepted")
        yield listed
        try:
            yield from self._with_an_object()
        finally:
            # Also after a put whose answer was lost, and where the caller stops listening.
            if not self.gone:
                with suppress(Exception):
                    self.client.delete_object(Bucket=self.bucket, Key=self.key)

    def _with_an_object(self) -> Iterator[Check]:
        put = self._step("write", self._put)
        yield put
        if put.status != "ok":
            yield Check("storage", "read, delete", "skipped", "without a probe there is nothing to try them on")
            return
        yield self._step("read", self._read)
        yield self._step("put if absent", self._put_again)
        yield self._step("delete", self._delete)

    def _step(self, name: str, act: Callable[[], str | None]) -> Check:
        """One check: `act` gives what is wrong with the answer, or None."""
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        if time.monotonic() > self.deadline:
            return Check("storage", name, "skipped", "the steps before took too long")
        place = f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket
        started = time.monotonic()
        try:
            wrong = act()
        except ClientError as error:
            code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            advice = _KEYS.get(code) or (
                f"Give this key the right to {name} under '{place}' ({_RIGHTS[name]} in a bucket policy)."
                if status == 403
                else "Look at the server's log for the reason, and run `sae doctor` again."
                if status != 501
                else _ANOTHER_SERVER
            )
            return Check("storage", name, "failure", f"{code}: {message}", advice)
        except BotoCoreError as error:
            advice = "The server stopped answering: look at its log and at the network, and run `sae doctor` again."
            return Check("storage", name, "failure", explained(error), advice)
        if wrong is not None:
            return Check("storage", name, "failure", wrong, _ANOTHER_SERVER)
        return Check("storage", name, "ok", f"{place} in {(time.monotonic() - started) * 1e3:.0f} ms")

    def _list(self) -> None:
        self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/" if self.prefix else "", MaxKeys=1)

    def _put(self) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.key, Body=_CONTENT)

    def _read(self) -> str | None:
        content = self.client.get_object(Bucket=self.bucket, Key=self.key)["Body"].read()
        return None if content == _CONTENT else "what was read is not what was written"

    def _put_again(self) -> str | None:
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self.key, Body=b"second", IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in _REFUSED:
                raise
            return None
        return "the server ignored If-None-Match and let a second put replace the first"

    def _delete(self) -> str | None:
        from botocore.exceptions import ClientError

        self.client.delete_object(Bucket=self.bucket, Key=self.key)
        try:
            self.client.head_object(Bucket=self.bucket, Key=self.key)
        except ClientError:  # 403 instead of 404 without the right to list
            self.gone = True
            return None
        return "the probe is still there after its deletion"
