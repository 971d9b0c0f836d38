"""What stands before every request: who asks, how much is sent, in what form and when. Closed unless opened here.

Each address but those of `PUBLIC` needs a key, known or not. A body is counted as it comes in and refused at its limit. A
compressed body is refused whole, so that none can unfold. Without keys, a request must name this machine as its host and must
not come from a page of another, as any web page in a browser here could otherwise reach the service. A query that finds the
queue full is refused before it is read, as reading those would take the time of those that are in.
"""

from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyicl.errors import OverloadedError
from manyicl.serving.errors import ApiError, BodyTooLargeError, error_response
from manyicl.serving.keys import KeyRing
from manyicl.serving.settings import Limits, is_loopback

PAGE_FILES = ("page.css", "base.js", "examples.js", "task.js", "page.js")
PUBLIC = frozenset({"/", *(f"/page/{name}" for name in PAGE_FILES), "/healthz", "/readyz", "/metrics", "/openapi.json"})
OPEN_TENANT = "local"
UPLOAD = "/v1/files"
QUERIES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/classify"})
_FORM_BYTES = 64 * 1024  # What a form adds to its file.


class Guarded:
    """An application behind its guard.

    Args:
        keys: Who may come in; None where everyone on this machine may.
        check_room: Told how many queries were read and are not answered, refuses a further one that finds no room; may raise
            `OverloadedError`.
        is_public: Whether a path needs no key, beyond `PUBLIC`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyRing | None,
        limits: Limits,
        check_room: Callable[[int], None],
        is_public: Callable[[str], bool] = PUBLIC.__contains__,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._check_room = check_room
        self._is_public = is_public
        self._unanswered: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, refused or handed on with its tenant in `scope["state"]`."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        max_bytes = self._limits.max_body_bytes
        if scope["path"] == UPLOAD and scope["method"] == "POST":
            max_bytes = self._limits.max_file_bytes + _FORM_BYTES
        is_query = scope["path"] in QUERIES and scope["method"] == "POST"
        try:
            tenant = self._find_tenant(scope["path"], headers)
            if tenant is not None:
                scope.setdefault("state", {})["tenant"] = tenant
            _check_form(headers, max_bytes)
            if is_query:
                scope.setdefault("state", {})["route"] = scope["path"]  # For who notes requests, as no route will be found.
                self._check_room(len(self._unanswered))
        except (ApiError, BodyTooLargeError, OverloadedError) as error:
            await error_response(error)(scope, receive, send)
            return
        await self._hand_on(scope, receive, send, max_bytes=max_bytes, is_query=is_query)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send, *, max_bytes: int, is_query: bool) -> None:
        """A request to the application, its body counted; a query also from when it is read until it begins to be answered."""
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise BodyTooLargeError(max_bytes)
            if is_query and message["type"] == "http.request" and not message.get("more_body"):
                self._unanswered.add(id(scope))
            return message

        async def send_noted(message: Message) -> None:
            self._unanswered.discard(id(scope))
            await send(message)

        try:
            await self._app(scope, receive_counted, send_noted)
        finally:
            self._unanswered.discard(id(scope))

    def _find_tenant(self, path: str, headers: Headers) -> str | None:
        """Whose request it is; None for a public address.

        Raises:
            ApiError: nobody's.
        """
        if self._keys is None:
            _check_local(headers)
            return OPEN_TENANT
        if self._is_public(path):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "You didn't provide an API key. Send it as: Authorization: Bearer KEY."
            raise ApiError(401, message, code="missing_api_key", headers={"WWW-Authenticate": "Bearer"})
        tenant = self._keys.find_tenant(key.strip())
        if tenant is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return tenant


def _check_local(headers: Headers) -> None:
    places = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
    for place in places:
        try:
            host = urlsplit(place).hostname or ""
        except ValueError:
            host = ""
        if not is_loopback(host):
            message = "Without API keys this service answers requests to and from this machine alone. Start it with --api-keys."
            raise ApiError(403, message, code="not_local")


def _check_form(headers: Headers, max_bytes: int) -> None:
    """Refuse a body by what its headers say of it."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, "Compressed bodies are not taken. Send it without Content-Encoding.", code="unsupported_encoding")
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise BodyTooLargeError(max_bytes)
