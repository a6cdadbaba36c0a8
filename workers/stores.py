"""Stores of objects: s3, gs, az, https, hf and local paths through obstore.

`open_store` is the one place that turns a URL and the config into a store of obstore and a key in it. obstore moves the
bytes. Credentials come from each provider's own library: boto3, google-auth, and Azure's chain inside obstore.
`kind_of` is the one mapping of obstore's errors; every other module sees a `StoreError` with a kind.

    s3://BUCKET/KEY     credentials, profile, region as boto3 finds them
    gs://BUCKET/KEY     Google's application default credentials
    az://CONTAINER/KEY  AZURE_STORAGE_ACCOUNT_NAME with a key, a SAS token, a service principal or a managed identity
    https://HOST/PATH   signatures from `data.stores.signed_urls`; for reading, without listing
    hf://datasets/ORG/NAME[@REVISION]/PATH    the token of huggingface_hub; for reading, without listing
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import obstore
from obstore import exceptions

from sigray.workers.config import StoresConfig

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

Answer = TypeVar("Answer")

_PROBE_S = 2.0  # for a machine's metadata server: it answers within milliseconds, or is not there
MAX_LISTED = 1_000_000  # names; LAION-5B is 232,000 tars with two sidecars each
_MAX_STORES = 64  # open ones of a process; each URL of https:// is one
_TTL = timedelta(minutes=5)  # botocore renews credentials ten minutes before they expire
_DEFAULTS = StoresConfig()
_PROVIDERS = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"),
}
_GOOGLE_STATIC = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
)
_AZURE_STATIC = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "IDENTITY_ENDPOINT",
    "AZURE_USE_AZURE_CLI",
)
_EXPIRED = re.compile(r"expired|TokenRefreshRequired|invalid_grant", re.IGNORECASE)
_DENIED = (301, 307, 400, 401, 403, 407)  # 400 is S3's answer to expired credentials, and to the wrong region


class StoreError(OSError):
    """A failure of a store; the message names URL, reason and remedy.

    Attributes:
        kind: missing, exists, changed, denied, expired, throttled, server error, stalled, cut, unreachable,
            wrong answer, no ranges, no credentials or other.
    """

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind


class MissingError(StoreError, FileNotFoundError):
    """There is no such object."""


class ExistsError(StoreError, FileExistsError):
    """A conditional write found an object."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object as listed.

    Attributes:
        etag: without its quotation marks; empty if the store gives none.
    """

    url: str
    num_bytes: int
    etag: str


@dataclass(frozen=True)
class Failure:
    """Why a request failed: a kind of `StoreError`, and the store's answer."""

    kind: str
    status: int = 0
    code: str = ""
    message: str = ""


def kind_of(error: BaseException) -> Failure:
    """Return the failure that an exception of obstore stands for."""
    text = str(error)
    found = re.search(r"status code: (\d{3})", text)
    status = int(found[1]) if found else 0
    found = re.search(
        r"<Code>([^<]{1,80})</Code>|\"(?:reason|error)\":\s*\"(\w{1,80})\"", text.partition("Debug source")[0]
    )
    code = (found[1] or found[2]) if found else ""
    message = f"{status} {code}".strip() if status else _message(text)

    def failure(kind: str) -> Failure:
        return Failure(kind, status, code, message)

    if isinstance(error, exceptions.AlreadyExistsError):
        return failure("exists")
    if isinstance(error, exceptions.PreconditionError | exceptions.NotModifiedError) or status == 412:
        return failure("changed")
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return failure("missing")
    if status in (429, 503) or code in ("SlowDown", "ServiceUnavailable", "TooManyRequests", "ServerBusy"):
        return failure("throttled")
    if status >= 500 or status == 408 or code == "RequestTimeout":
        return failure("server error")
    if status in _DENIED or isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return failure("expired" if _EXPIRED.search(code) else "denied")
    if status:
        return failure("other")
    if re.search(r"kind: Timeout|TimedOut|timed out", text):
        return failure("unreachable" if re.search(r"kind: Connect\b|\bConnectError", text) else "stalled")
    if re.search(r"kind: Connect\b|\bConnectError|dns error", text):
        return failure("unreachable")
    if re.search(r"NotPartial|Range request not supported", text):
        return failure("no ranges")
    if re.search(r"UnexpectedRange|Requested .*got|CONTENT_RANGE|Content-Range", text):
        return failure("wrong answer")
    if re.search(r"HttpError|hyper|reqwest|body error", text):
        return failure("cut")
    return failure("other")


def _message(text: str) -> str:
    """Return the innermost reason of obstore's text, without URLs and their secrets."""
    reasons = re.findall(r'(?:message|source|error): "([^"]{3,160})"', text)
    inner = reasons[-1] if reasons else text.partition("Debug source")[0].strip()
    return re.sub(r"\w+://\S+", "", inner)[:200].strip(" :")


@contextlib.contextmanager
def explained(url: str, stores: StoresConfig = _DEFAULTS) -> Iterator[None]:
    """Raise obstore's errors as a `StoreError` with URL, reason and remedy."""
    try:
        yield
    except (exceptions.BaseError, FileNotFoundError) as error:
        if isinstance(error, StoreError):
            raise
        # Without the cause: obstore's text repeats the request, whose query may hold a signature.
        raise error_of(url, kind_of(error), stores) from None


def error_of(url: str, failure: Failure, stores: StoresConfig = _DEFAULTS) -> StoreError:
    """Return the user's error for a failure."""
    at = endpoint_of(url, stores)
    scheme, bucket, _ = split_url(url)
    shown = shown_url(url)
    kind, reason = failure.kind, failure.message
    if kind == "missing" and failure.code in ("NoSuchBucket", "ContainerNotFound", "InvalidBucketName"):
        key = f"data.stores.{scheme}_endpoint"
        return MissingError(f"{shown}: there is no bucket {bucket!r} at {at}; check the URL and {key}", kind)
    if kind == "missing":
        return MissingError(f"{shown}: there is no such object at {at}", kind)
    if kind == "exists":
        return ExistsError(f"{shown}: the object exists already", kind)
    if kind == "changed":
        return StoreError(f"{shown}: the object was replaced meanwhile ({reason})", kind)
    if kind == "expired":
        return StoreError(f"{shown}: the credentials have expired ({reason}): renew them; {_remedy(url, stores)}", kind)
    if kind == "denied":
        return StoreError(f"{shown}: access denied by {at} ({reason}); {_remedy(url, stores)}", kind)
    if kind in ("unreachable", "stalled", "cut"):
        names = [f"data.stores.{scheme}_endpoint", _ENDPOINTS[scheme][-1]] if scheme in _ENDPOINTS else ["the URL"]
        return StoreError(
            f"{shown}: cannot reach the store {at}: {reason}; check the network and {' and '.join(names)}", kind
        )
    if kind == "no ranges":
        return StoreError(
            f"{shown}: the store {at} ignores ranges (it answers a Range request with the whole object), which sigray "
            "needs to resume after a broken connection: use a store with ranges, or copy the shards",
            kind,
        )
    if "invalid path" in reason:
        return StoreError(f"{shown}: cannot be listed: {reason}; rename the object, or name the files one by one", kind)
    return StoreError(f"{shown}: {at} answers {reason}", kind)


def _remedy(url: str, stores: StoresConfig) -> str:
    scheme = split_url(url)[0]
    if stores.anonymous:
        return "requests are not signed (data.stores.anonymous=true): is the bucket public?"
    public = "or data.stores.anonymous=true for a public bucket"
    if scheme == "s3":
        used = f"profile {stores.profile!r} was used" if stores.profile else "data.stores.profile is not set"
        return (
            f"{used}: set data.stores.profile or the AWS_ variables (AWS_PROFILE, or AWS_ACCESS_KEY_ID with "
            "AWS_SECRET_ACCESS_KEY and, for temporary ones, AWS_SESSION_TOKEN), data.stores.region for a bucket of "
            f"another region, {public}"
        )
    if scheme == "gs":
        return (
            "set GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT to a key file, run `gcloud auth "
            f"application-default login`, use a machine with a service account, {public}"
        )
    if scheme == "az":
        return (
            "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
            f"AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET, or use a machine with a managed identity, "
            f"{public}"
        )
    if scheme == "hf":
        return "set HF_TOKEN, or log in with `hf auth login`; the terms of a gated data set must be accepted"
    if stores.signed_urls:
        return f"is the line of the URL in data.stores.signed_urls={stores.signed_urls} missing, or too old?"
    return "private shards need data.stores.signed_urls; copy any other private file to a folder or a bucket"


def split_url(url: str) -> tuple[str, str, str]:
    """Return scheme ("" for a path), bucket (or host) and key of a URL.

    Raises:
        StoreError: the URL names no bucket.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "", "", url.lstrip("/")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise StoreError(f"{url!r} names no bucket: {scheme}://BUCKET/KEY expected")
    return scheme, bucket, key


def shown_url(url: str) -> str:
    """Return a URL for messages, without user and query."""
    return re.sub(r"//[^/]*@", "//", url).partition("?")[0] if "://" in url else url


def endpoint_of(url: str, stores: StoresConfig = _DEFAULTS) -> str:
    """Return the endpoint for messages, without the password that a variable may hold."""
    scheme, bucket, _ = split_url(url)
    if scheme == "hf":
        return _hub()
    if scheme not in _ENDPOINTS:
        return f"{scheme}://{bucket}" if scheme else "the local disk"
    return shown_url(_endpoint(scheme, stores) or {"s3": "Amazon S3", "gs": "Google Storage", "az": "Azure"}[scheme])


def _endpoint(scheme: str, stores: StoresConfig) -> str | None:
    """Return the endpoint of config or environment; None: the provider's own."""
    return getattr(stores, f"{scheme}_endpoint") or next(filter(None, map(os.environ.get, _ENDPOINTS[scheme])), None)


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


_open: OrderedDict[tuple[object, ...], ObjectStore] = OrderedDict()
_lock = threading.Lock()


def open_store(
    url: str, stores: StoresConfig = _DEFAULTS, *, max_retries: int = 5, fresh: bool = False
) -> tuple[ObjectStore, str]:
    """Return the store of a URL or local path, and the key in it.

    Stores are shared within a process, with their connections and credentials. They are made again after a change of
    the environment.

    Args:
        max_retries: of a request that fails, by obstore; 0: the caller retries.
        fresh: make the store again, with new credentials.

    Raises:
        StoreError: no credentials, within seconds; an unusable endpoint, profile or URL.
    """
    scheme, bucket, key = split_url(url)
    if scheme in ("https", "http"):
        bucket = _web_url(url, stores)  # the store keeps the query and the encoding of the path
        key = ""
    elif scheme == "hf":
        bucket = _hub_url(url)
        key = ""
    variables = sorted(
        item for item in os.environ.items() if item[0].startswith((*_PROVIDERS.values(), "HF_", "STORAGE_"))
    )
    # Connections do not survive a fork.
    wanted = (os.getpid(), scheme, bucket, max_retries, stores, *variables)
    with _lock:
        if wanted not in _open or fresh:
            _open[wanted] = _make(url, scheme, bucket, stores, max_retries)
        _open.move_to_end(wanted)
        while len(_open) > _MAX_STORES:
            _open.popitem(last=False)
        return _open[wanted], key


def _make(url: str, scheme: str, bucket: str, stores: StoresConfig, max_retries: int) -> ObjectStore:
    from obstore import store

    client: dict[str, Any] = {
        # The whole of a slow download may take hours; one silent read may not.
        "timeout": timedelta(days=1),
        "connect_timeout": timedelta(seconds=min(stores.read_timeout_s, 10)),
        "read_timeout": timedelta(seconds=stores.read_timeout_s),
        "allow_http": True,
    }
    retry = {"max_retries": max_retries, "retry_timeout": timedelta(seconds=min(stores.deadline_s, 180))}
    given: dict[str, Any] = {"client_options": client, "retry_config": retry}
    try:
        if scheme == "s3":
            return store.S3Store(bucket, **given, **_s3(url, bucket, stores, client))
        if scheme == "gs":
            return store.GCSStore(bucket, **given, **_gs(url, stores, client))
        if scheme == "az":
            return store.AzureStore(bucket, **given, **_az(url, stores))
        if scheme == "hf":
            from huggingface_hub import get_token

            if token := get_token():  # not sent after a redirect to another host
                client["default_headers"] = {"authorization": f"Bearer {token}"}
        if scheme in ("https", "http", "hf"):
            return store.HTTPStore(bucket, **given)
        return store.LocalStore("/")
    except (exceptions.BaseError, ValueError) as error:
        named = f"data.stores and the {_PROVIDERS[scheme]}_ variables" if scheme in _PROVIDERS else "the URL"
        raise StoreError(f"{shown_url(url)}: no client can be made: {_message(str(error))}; check {named}") from None


def _checked(endpoint: str | None) -> str | None:
    """Return an endpoint, or raise: obstore panics on one that is no URL."""
    if endpoint and (urlsplit(endpoint).scheme not in ("http", "https") or re.search(r"\s", endpoint)):
        raise ValueError(f"the endpoint {endpoint[:100]!r} is no http(s) URL")
    return endpoint


def _s3(url: str, bucket: str, stores: StoresConfig, client: dict[str, Any]) -> dict[str, Any]:
    import boto3
    import botocore.session
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    endpoint = _checked(_endpoint("s3", stores))
    options: dict[str, Any] = {"request_payer": stores.requester_pays, "skip_signature": stores.anonymous}
    if endpoint:  # stand-alone stores support path-style addresses only
        options |= {"endpoint": endpoint.rstrip("/"), "virtual_hosted_style_request": False}
    try:
        core = botocore.session.Session(profile=stores.profile)
        session = boto3.session.Session(botocore_session=core)
        options["region"] = stores.region or session.region_name or _region_of(bucket, bool(endpoint))
        if bundle := core.get_config_variable("ca_bundle"):
            client["root_certificate"] = Path(bundle).read_bytes()
        if stores.anonymous:
            return options
        if session.get_credentials() is None:
            raise _no_credentials(
                url, "looked in the AWS_ variables, the files of ~/.aws and the role of this machine", stores
            )
        provider = Boto3CredentialProvider(session, ttl=_TTL)
        provider()  # an expired login fails here, with boto3's own words
        return options | {"credential_provider": provider}
    except (BotoCoreError, AssertionError) as error:
        raise _no_credentials(url, str(error), stores) from None


def _region_of(bucket: str, has_endpoint: bool) -> str:
    """Return the region of a bucket at Amazon, which says it to everybody."""
    if not has_endpoint:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPSConnection("s3.amazonaws.com", timeout=_PROBE_S)
            connection.request("HEAD", f"/{quote(bucket)}")
            if region := connection.getresponse().getheader("x-amz-bucket-region"):
                return region
    return "us-east-1"


def _gs(url: str, stores: StoresConfig, client: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {"skip_signature": stores.anonymous}
    if endpoint := _checked(_endpoint("gs", stores)):
        options["base_url"] = endpoint.rstrip("/")
    if stores.requester_pays:
        project = os.environ.get("GOOGLE_CLOUD_QUOTA_PROJECT") or os.environ.get("GOOGLE_CLOUD_PROJECT")
        if not project:
            raise StoreError(f"{url}: data.stores.requester_pays needs the project that pays: set GOOGLE_CLOUD_PROJECT")
        client["default_headers"] = {"x-goog-user-project": project}
    if stores.anonymous or any(map(os.environ.get, _GOOGLE_STATIC)):
        return options
    import google.auth
    from google.auth import exceptions as google_exceptions
    from obstore.auth.google import GoogleCredentialProvider

    login = Path(os.environ.get("CLOUDSDK_CONFIG", "~/.config/gcloud"), "application_default_credentials.json")
    server = os.environ.get("GCE_METADATA_HOST", "169.254.169.254")
    names = ", ".join(("GOOGLE_APPLICATION_CREDENTIALS", *_GOOGLE_STATIC))
    looked = f"looked in {names}, the login of gcloud ({login}) and {server}"
    has_file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or login.expanduser().exists()
    if not has_file and not _answers(server):
        raise _no_credentials(url, looked, stores)
    try:
        scopes = ["https://www.googleapis.com/auth/devstorage.read_write"]
        provider = GoogleCredentialProvider(google.auth.default(scopes=scopes)[0])
        provider()
        return options | {"credential_provider": provider}
    except (google_exceptions.GoogleAuthError, OSError, ValueError) as error:
        raise _no_credentials(url, f"{looked}: {_message(str(error))}", stores) from None


def _az(url: str, stores: StoresConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"skip_signature": stores.anonymous}
    if endpoint := _checked(_endpoint("az", stores)):
        options["endpoint"] = endpoint.rstrip("/")
    if not os.environ.get("AZURE_STORAGE_ACCOUNT_NAME"):
        raise StoreError(f"{url}: no storage account: set AZURE_STORAGE_ACCOUNT_NAME", "no credentials")
    server = "169.254.169.254"
    if not stores.anonymous and not any(map(os.environ.get, _AZURE_STATIC)) and not _answers(server):
        raise _no_credentials(url, f"looked in {', '.join(_AZURE_STATIC)} and {server}", stores)
    return options


def _answers(server: str) -> bool:
    """Return whether a metadata server answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(server, timeout=_PROBE_S)
        connection.request("GET", "/")
        return bool(connection.getresponse().status)
    return False


def _no_credentials(url: str, reason: str, stores: StoresConfig) -> StoreError:
    message = f"{shown_url(url)}: no credentials: {reason.rstrip('.')}; {_remedy(url, stores)}"
    return StoreError(message, "no credentials")


def _web_url(url: str, stores: StoresConfig) -> str:
    """Return the URL to request: that of `stores.signed_urls`, if it has a line."""
    if "@" in urlsplit(url).netloc:
        raise StoreError(f"{shown_url(url)}: name and password in a URL are not sent: use a presigned URL")
    if stores.signed_urls is None:
        return url
    try:
        return _signed_urls(stores.signed_urls, os.stat(stores.signed_urls).st_mtime_ns).get(url, url)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise StoreError(f"data.stores.signed_urls: {stores.signed_urls} cannot be read: {reason}") from None


@functools.lru_cache(maxsize=4)
def _signed_urls(path: str, modified_ns: int) -> dict[str, str]:
    """Return the lines of a file by their URL without query."""
    return {line.partition("?")[0]: line for line in Path(path).read_text().split()}


def _hub_url(url: str) -> str:
    """Return the hub's https URL of hf://datasets/ORG/NAME[@REVISION]/PATH."""
    found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if not found:
        raise StoreError(f"{url}: hf://datasets/ORG/NAME[@REVISION]/PATH expected")
    return f"{_hub()}/datasets/{found[1]}/resolve/{quote(unquote(found[2] or 'main'), safe='')}/{quote(found[3])}"


def can_list(url: str) -> bool:
    return split_url(url)[0] in ("", *_PROVIDERS)


def list_objects(url_prefix: str, stores: StoresConfig = _DEFAULTS, *, is_flat: bool = False) -> Iterator[ObjectInfo]:
    """Yield all objects whose URL begins with a prefix, page by page.

    Args:
        is_flat: leave out the keys with a slash after the prefix.

    Raises:
        StoreError: the store cannot be reached, refuses, or cannot list.
    """
    if not can_list(url_prefix):
        raise StoreError(f"{shown_url(url_prefix)}: cannot be listed: name the files, by braces or as a list")
    scheme, bucket, prefix = split_url(url_prefix)
    store, _ = open_store(url_prefix, stores)
    folder = prefix.rpartition("/")[0]  # obstore lists by whole folders
    with explained(url_prefix, stores):
        for item in listed(store, folder, url_prefix, stores.deadline_s):
            path = item["path"]
            if path.startswith(prefix) and not (is_flat and "/" in path[len(prefix) :]):
                yield _info(f"{scheme}://{bucket}/{path}", item)


def listed(store: ObjectStore, folder: str, url: str, deadline_s: float) -> Iterator[ObjectMeta]:
    """Yield the objects in a folder and below, page by page.

    A listing ends, though a broken server may repeat its pages for ever.

    Raises:
        StoreError: there are more than `MAX_LISTED`; no 1,000 names came within `deadline_s`.
    """
    pages = store.list(folder or None, chunk_size=1000)
    num_listed = 0
    while page := within(deadline_s, lambda: next(pages, None), url):
        num_listed += len(page)
        if num_listed > MAX_LISTED:
            raise StoreError(f"{url!r} lists more than {MAX_LISTED:,} names: use a longer prefix")
        yield from page


def within(seconds: float, listing: Callable[[], Answer], url: str) -> Answer:
    """Return what a listing gives.

    It runs in a thread, which stays until the process ends if the listing has no end. obstore's coroutines could be
    cancelled, but 5 % of the processes that exited after one were aborted: its threads need the GIL a little longer.

    Raises:
        StoreError: it takes longer.
    """
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(listing())
        except BaseException as error:  # the caller raises it
            answer.set_exception(error)

    threading.Thread(target=run, name="listing", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise  # of the listing
        message = f"{url!r}: the store sends pages of a listing for {seconds:g} s without an end: is the server broken?"
        raise StoreError(message, "stalled") from None


def _info(url: str, item: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(url, item["size"], etag_of(item))


def etag_of(item: Mapping[str, Any]) -> str:
    return (item["e_tag"] or "").strip('"')


def stat(url: str, stores: StoresConfig = _DEFAULTS) -> ObjectInfo:
    """Return size and ETag of one object.

    Raises:
        StoreError: the object is missing, or the store cannot be reached or refuses.
    """
    store, key = open_store(url, stores)
    with explained(url, stores):
        try:
            # Not HEAD: a presigned URL allows only GET, and an answer without a body does not tell a missing bucket.
            return _info(url, obstore.get(store, key, options={"range": (0, 1)}).meta)
        except exceptions.BaseError as error:
            if kind_of(error).status != 416 and kind_of(error).kind not in ("wrong answer", "no ranges"):
                raise  # an empty object has no first byte; a single file can be read without ranges
            return _info(url, obstore.head(store, key))


def read_object(url: str, stores: StoresConfig = _DEFAULTS, max_bytes: int | None = None) -> bytes:
    """Return the content of a small object, or its first bytes.

    Raises:
        StoreError: as `stat`.
    """
    store, key = open_store(url, stores)
    with explained(url, stores):
        content = bytearray()
        for piece in obstore.get(store, key).stream(1 << 20):
            content += piece
            if max_bytes is not None and len(content) >= max_bytes:
                break
        return bytes(content[:max_bytes])
