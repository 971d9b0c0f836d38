"""The page in the browser: files sent as they are, with headers that let it load nothing from elsewhere.

The page's style and scripts are addressed with a hash of their content, so that browsers keep them for good and never show an old
one. Scripts of others cannot run in it: none may stand in the document, and Trusted Types forbid text as markup.
"""

import hashlib
from functools import cache
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from manyicl.serving.guard import PAGE_FILES
from manyicl.serving.service import ServiceNow

router = APIRouter(include_in_schema=False)

_FOLDER = files("manyicl.serving") / "page"
_TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FOR_GOOD = "public, max-age=31536000, immutable"


@cache
def read_page_file(name: str) -> tuple[bytes, str]:
    """A file of the page and the hash of its content."""
    content = (_FOLDER / name).read_bytes()
    return content, _hash(content)


@cache
def fill_page(*, has_keys: bool) -> tuple[bytes, str]:
    """The document with the addresses of its style and scripts, told whether to ask for a key; and its hash."""
    text = read_page_file("index.html")[0].decode()
    for name in PAGE_FILES:
        text = text.replace(f'"{name}"', f'"/page/{name}?v={read_page_file(name)[1]}"')
    if has_keys:
        text = text.replace('data-keys="no"', 'data-keys="yes"')
    return text.encode(), _hash(text.encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@router.api_route("/", methods=["GET", "HEAD"])
async def get_page(request: Request, service: ServiceNow) -> Response:
    """The page; asked for again each time, and sent again only when it has changed."""
    content, digest = fill_page(has_keys=service.settings.api_keys is not None)
    headers = _HEADERS | {"Cache-Control": "no-cache", "ETag": f'"{digest}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


async def get_page_file(request: Request, v: Annotated[str, Query(max_length=64)] = "") -> Response:
    """A file that the page is made of; `v` is the hash that its reader expects."""
    name = request.url.path.rpartition("/")[2]
    content, digest = read_page_file(name)
    kept = _FOR_GOOD if v == digest else "no-cache"
    return Response(content, media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS | {"Cache-Control": kept})


for _name in PAGE_FILES:
    router.add_api_route(f"/page/{_name}", get_page_file)
