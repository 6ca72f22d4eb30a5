"""Objects of a store (`s3://`, `gs://`, `az://`, by obstore): byte ranges, listing, uploads. Files of the Hugging Face
Hub (`hf://`) are listed here and read over https.

Credentials come from the environment, the usual files of each cloud, or the role of the host; never from a
configuration. Of an error only status and code are passed on: its text may hold a signature or a token.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jp_train.data.http_ranges import HTTP_TIMEOUT_S, SLOWEST_BYTES_PER_S, Answered, HttpStatusError
from jp_train.data.hub import HUB, WHO_READS, split_hub
from jp_train.errors import ConfigError, DataError

STORES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
"""Schemes read by obstore, with what the names of their variables begin with."""
PIECE = 16 << 20
"""Bytes of one request, at most: a time-out holds for a whole request."""

_STATUS = re.compile(r"status code: ([0-9]{3}) ?([A-Za-z ]*)")
_CODE = re.compile(r'<Code>([A-Za-z]{1,64})</Code>|"reason": ?"([A-Za-z]{1,64})"')
_NO_CREDENTIALS = re.compile(r"169\.254\.|/latest/api/token|token request|credential", re.IGNORECASE)
_QUERY = re.compile(r"[?]\S*")


def scheme_of(path: str) -> str:
    """`s3`, `gs`, `az` or `hf`; empty for anything else."""
    scheme = path.partition("://")[0]
    return scheme if "://" in path and scheme in (*STORES, HUB) else ""


class StoreRanges:
    """What HttpRanges is for http: the same ranges, checks and kinds of errors, for objects of a store. Safe to use
    from threads; a process that was forked off one that used it needs its own."""

    def __init__(self, *, tries: int = 1) -> None:
        """`tries` of each request here; ShardReader repeats whole reads itself."""
        self._tries = tries
        self._stores: dict[str, Any] = {}
        self._answered: set[tuple[str, str]] = set()
        """Buckets that have answered: the credentials for them are right."""

    def stat(self, url: str) -> Answered:
        """Size and stamp of an object."""
        obstore = _library()
        store, key = self._place(url)
        try:
            with self._asking(url):
                return _answered(obstore.head(store, key))
        except HttpStatusError:  # the answer to a HEAD has no text: ask again for the cause
            with self._asking(url):
                return _answered(obstore.get(store, key, options={"range": (0, 1)}).meta)

    def read(self, url: str, offset: int, size: int, *, file_size: int, stamp: str) -> bytes:
        """Exactly `size` bytes from `offset` of an object that is known by its size and stamp."""
        obstore = _library()
        store, key = self._place(url)
        pieces = []
        for start in range(offset, offset + size, PIECE):
            end = min(start + PIECE, offset + size)
            with self._asking(url):
                result = obstore.get(store, key, options={"range": (start, end)})
                now = _answered(result.meta)
                if (now.size, now.stamp) != (file_size, stamp):
                    raise DataError(
                        f"shard {url} changed since it was indexed ({file_size} bytes, {stamp!r} became {now.size} "
                        f"bytes, {now.stamp!r}); start again to index it anew"
                    )
                data = bytes(result.bytes())
            if len(data) != end - start:
                raise OSError(f"the store sent {len(data)} bytes of {end - start}")
            pieces.append(data)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, path: Path, url: str) -> None:
        """Upload a file; the object appears when it is whole."""
        obstore = _library()
        store, key = self._place(url)
        with self._asking(url):
            obstore.put(store, key, path, chunk_size=PIECE)

    def expand(self, part: str) -> list[str]:
        """The objects that a URL names, sorted: a glob, a folder (its `*.tar`), or an object (which is not asked
        for)."""
        scheme, bucket, key = _split(part)
        pattern = key.split("/")
        if not glob.has_magic(key):
            if key.endswith(".tar"):
                return [part]
            pattern = [*(piece for piece in pattern if piece), "*.tar"]
        fixed = next(number for number, piece in enumerate(pattern) if glob.has_magic(piece))
        names = self._names(scheme, bucket, "/".join(pattern[:fixed]), deep=fixed < len(pattern) - 1)
        found = [f"{scheme}://{bucket}/{name}" for name in sorted(names) if _matches(name.split("/"), pattern)]
        is_object = not found and not glob.has_magic(key) and not key.endswith("/") and key
        return [part] if is_object else found

    def close(self) -> None:
        """Close the connections."""
        self._stores.clear()

    def _names(self, scheme: str, bucket: str, folder: str, *, deep: bool) -> list[str]:
        if scheme == HUB:
            return _hub_names(bucket, folder, deep=deep)
        obstore = _library()
        url = f"{scheme}://{bucket}/{folder}"
        store, prefix = self._place(url)
        with self._asking(url):
            if deep:
                return [item["path"] for batch in obstore.list(store, prefix) for item in batch]
            return [item["path"] for item in obstore.list_with_delimiter(store, prefix)["objects"]]

    @contextmanager
    def _asking(self, url: str) -> Iterator[None]:
        """For one request. Credentials that are missing are final (PermissionError), unless they were there before: a
        service that renews them can fail for a moment (OSError)."""
        bucket = _split(url)[:2]
        try:
            with _without_secrets(url):
                yield
        except PermissionError as error:
            if bucket in self._answered:
                raise OSError(str(error)) from None
            raise
        self._answered.add(bucket)

    def _place(self, url: str) -> tuple[Any, str]:
        scheme, bucket, key = _split(url)
        place = f"{scheme}://{bucket}"
        if place not in self._stores:
            with _without_secrets(url):
                self._stores[place] = _open_store(place, self._tries)
        return self._stores[place], key


def _library() -> Any:
    # a runtime of two threads in each worker, not one for each core of the host
    os.environ.setdefault("TOKIO_WORKER_THREADS", "2")
    try:
        import obstore
    except ImportError:
        raise ConfigError("s3://, gs:// and az:// need obstore: pip install 'jp_train[cloud]'") from None
    return obstore


def _open_store(place: str, tries: int = 1) -> Any:
    """An obstore of a bucket or container."""
    endpoints = [os.environ.get(f"AWS_ENDPOINT{end}", "") for end in ("", "_URL", "_URL_S3")]
    options: dict[str, Any] = {
        "timeout": f"{round(1000 * (HTTP_TIMEOUT_S + PIECE / SLOWEST_BYTES_PER_S))}ms",
        "allow_http": place.startswith("s3:") and any(url.startswith("http://") for url in endpoints),
    }
    given: dict[str, Any] = {}
    if place.startswith("s3:") and _has_aws_files():
        from obstore.auth.boto3 import Boto3CredentialProvider

        given["credential_provider"] = Boto3CredentialProvider()
    return _library().store.from_url(place, client_options=options, retry_config={"max_retries": tries - 1}, **given)


def _has_aws_files() -> bool:
    """Whether the keys are to come from a profile of ~/.aws (boto3 knows all its forms), not from the environment or
    the host's role, which obstore finds itself."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    files = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    there = any(os.path.exists(os.path.expanduser(os.environ.get(name, file))) for name, file in files.items())
    return there or "AWS_PROFILE" in os.environ


def _answered(meta: Any) -> Answered:
    return Answered(size=meta["size"], stamp=meta["e_tag"] or str(meta["last_modified"]))


@contextmanager
def _without_secrets(url: str) -> Iterator[None]:
    """Turns an error of obstore into HttpStatusError or OSError (worth a retry unless it is final), PermissionError (no
    credentials) or DataError (lasting), with nothing of its text but status and code."""
    try:
        yield
    except (DataError, ConfigError, HttpStatusError):
        raise
    except Exception as error:  # obstore's errors have no common base, and boto3's come through it
        raise _told(error, url) from None


def _told(error: Exception, url: str) -> Exception:
    text = str(error).partition("Debug source:")[0]
    names = f"{STORES[scheme_of(url)]}_... variables or the usual files of that cloud"
    status, code = _STATUS.search(text), _CODE.search(text)
    if _NO_CREDENTIALS.search(text.partition("status code")[0]):
        return PermissionError(f"no credentials that work were found: neither {names}, nor a role of this host")
    if status is not None:
        reason = f"{status[2].strip()} {(code[1] or code[2]) if code else ''}".strip()
        hint = f" (credentials come from {names})" if status[1] in ("401", "403") else ""
        return HttpStatusError(int(status[1]), f"{reason}{hint}")
    if "HTTP error" in text:
        return OSError(f"the connection failed or was too slow ({text.rpartition('HTTP error: ')[2].strip()[:100]})")
    return DataError(f"{url}: {_QUERY.sub('?...', text).strip()[:300]} (settings come from {names})")


def _matches(name: list[str], pattern: list[str]) -> bool:
    return len(name) == len(pattern) and all(map(fnmatch.fnmatchcase, name, pattern))


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, bucket (of the hub: repository and revision) and key. Raises ConfigError for a URL without them."""
    scheme = scheme_of(url)
    if scheme == HUB:
        return scheme, *split_hub(url)
    bucket, _, key = url[len(scheme) + 3 :].partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise ConfigError(
            f"a URL of {scheme}:// does not name its bucket as {scheme}://BUCKET/KEY; credentials come from "
            f"{STORES[scheme]}_... variables or the usual files of that cloud, never from a URL"
        )
    return scheme, bucket, key


def _hub_names(place: str, folder: str, *, deep: bool) -> list[str]:
    """Paths of the files in a folder of a repository; with `deep` in those below it too.

    Raises OSError, HttpStatusError where the hub has answered with one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = place.removeprefix("datasets/").partition("@")
    try:
        tree = HfApi().list_repo_tree(
            repository,
            folder or None,
            recursive=deep,
            repo_type="dataset",
            revision=urllib.parse.unquote(revision) or None,
        )
        return [entry.path for entry in tree if hasattr(entry, "size")]
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise HttpStatusError(status, f"{type(error).__name__} ({WHO_READS})") from None
    except Exception as error:  # of the library's own http client, which it may exchange for another
        raise OSError(f"the hub does not answer ({type(error).__name__})") from None
