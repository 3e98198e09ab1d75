"""What a client sends: a JSON object, or a form of texts and files. Bounded while it is read.

OpenAI's client sends every video as a form. Lists and objects are flattened there into names with brackets, as in
`steps[]` or `prompts[][prompt]`; other clients put JSON into one text. Both are understood.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from deployments.errors import RequestError
from deployments.schemas import Fields
from helios_core.errors import InvalidInput

F = TypeVar("F", bound=Fields)

QUIET = 10  # a body may stand still for one part in so many of the time that it has
MAX_FIELDS = 1000
MAX_FILES = 4  # more than one is refused by name; more than these, as what it is
BRACKETED = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\]){1,4})")


@dataclass(frozen=True)
class Body:
    """`fields`: by name, JSON values, or texts if it is a form; `files`: by name, in order."""

    fields: Mapping[str, Any]
    files: Mapping[str, list[UploadFile]] = field(default_factory=dict)
    is_form: bool = False

    def parse(self, kind: type[F], file: str | None = None) -> F:
        """The fields as `kind` has them; `file`: the name of the one file that there may be. Raises InvalidInput."""
        for name, uploads in self.files.items():
            if name != file:
                allowed = "no file" if file is None else f"a file in the field {file}"
                raise InvalidInput(name, uploads[0].filename, allowed)
            if len(uploads) > 1:
                raise InvalidInput(name, f"{len(uploads)} files", "one file: an image or a video")
        return kind.parse(self.fields, from_text=self.is_form)

    def file(self, name: str) -> UploadFile | None:
        return self.files[name][0] if name in self.files else None

    async def digest(self, route: str) -> str:
        """Hex, of what is asked of `route`, and not of the bytes: a form that is sent again has another boundary.

        Raises RequestError for what is nested too deeply.
        """
        files = {
            name: [await asyncio.to_thread(_sha256, upload.file) for upload in uploads]
            for name, uploads in self.files.items()
        }
        try:
            asked = json.dumps([route, self.fields, files], sort_keys=True)
        except RecursionError as error:
            raise RequestError(400, "invalid_json", f"the body is nested too deeply: {error}") from None
        return hashlib.sha256(asked.encode()).hexdigest()


class _Parser(MultiPartParser):
    """Also tells whether the boundary came that ends a form."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


@asynccontextmanager
async def read_body(
    request: Request, max_bytes: int, max_upload_bytes: int = 0, max_seconds: float = 600.0
) -> AsyncIterator[Body]:
    """The body of a request; its files are there until the block ends.

    `max_bytes`: of JSON, and of the texts of a form; `max_upload_bytes`: of the files, 0 if there can be none;
    `max_seconds`: until it is there. Raises RequestError: 413 and 408 past these, 415 for another type, 400 if broken.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield Body(_json_object(b"".join([part async for part in _bounded(request, max_bytes, max_seconds)])))
    elif kind == "multipart/form-data":
        parts = _bounded(request, max_bytes + max_upload_bytes, max_seconds)
        # The parser would guess at bytes that are not in the charset; of Latin-1 it gives every byte back.
        headers = Headers({"content-type": f"{request.headers['content-type']}; charset=latin-1"})
        parser = _Parser(headers, parts, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_bytes)
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if "exceeded maximum size" in error.message:
                raise _too_large(max_bytes) from None
            raise RequestError(400, "invalid_form", f"the body is no form: {error.message}") from None
        try:
            if not parser.ended:  # a part that was cut off would be left out
                raise RequestError(400, "invalid_form", "the body is no form: it ends before its last boundary")
            texts: list[tuple[str, str]] = []
            files: dict[str, list[UploadFile]] = {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(_utf8(name).removesuffix("[]"), []).append(value)
                else:
                    texts.append((_utf8(name), _utf8(value)))
            if sum(len(name) + len(value) for name, value in texts) > max_bytes:
                raise _too_large(max_bytes)
            yield Body(_nested(texts), files, is_form=True)
        finally:
            await form.close()
    else:
        allowed = "application/json or multipart/form-data"
        raise RequestError(415, "unsupported_media_type", f"Content-Type is {kind[:80]!r}; allowed: {allowed}")


@asynccontextmanager
async def on_disk(upload: UploadFile) -> AsyncIterator[Path]:
    """An upload as a file with a name of our own; it is gone when the block ends."""
    with tempfile.NamedTemporaryFile(prefix="helios-upload-") as file:
        await asyncio.to_thread(shutil.copyfileobj, upload.file, file)
        file.flush()
        yield Path(file.name)


async def _bounded(request: Request, limit: int, seconds: float) -> AsyncGenerator[bytes, None]:
    """The body, part by part. Raises RequestError 413 as soon as it is known to be longer than `limit` bytes, 408 if it
    takes longer than `seconds`, or a tenth of that without a byte, 400 if the client leaves."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise _too_large(limit)
    size, clock = 0, asyncio.get_running_loop().time
    until, stream = clock() + seconds, aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout_at(min(until, clock() + seconds / QUIET)):
                part = await anext(stream)
        except StopAsyncIteration:
            return
        except ClientDisconnect:  # nobody hears this; it is no bug
            raise RequestError(400, "body_cut_off", f"the client left after {size} bytes of the body") from None
        except TimeoutError:
            allowed = f"{seconds:g} s in all, {seconds / QUIET:g} s without a byte"
            message = f"the body came too slowly: {size} bytes of it; allowed: {allowed}"
            raise RequestError(408, "body_too_slow", message, headers={"Connection": "close"}) from None
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        yield part


def _sha256(file: BinaryIO) -> str:
    """Of a file that is at its start, and is left there."""
    digest = hashlib.sha256()
    while part := file.read(2**20):
        digest.update(part)
    file.seek(0)
    return digest.hexdigest()


def _too_large(limit: int) -> RequestError:
    return RequestError(413, "body_too_large", f"the body is too large; allowed: {limit} bytes")


def _utf8(text: str) -> str:
    """The text of which `text` has the bytes, one in each character."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise RequestError(400, "invalid_form", f"the body is no form: a text is not UTF-8: {error.reason}") from None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "invalid_json", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "invalid_json", f"the body is a JSON {type(body).__name__}; allowed: an object")
    return body


def _nested(texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Flattened names put together again: `a[]` is a list, `a[b]` an object, `a[][b]` a list of objects.

    Raises InvalidInput for a name that is there twice, and for objects of a list that differ in their names.
    """
    fields: dict[str, Any] = {}
    for name, text in texts:
        match = BRACKETED.fullmatch(name)
        path = [name] if match is None else [match[1], *re.findall(r"\[([^\[\]]*)\]", match[2])]
        if not _put(fields, path, text):
            raise InvalidInput(name[:80], text, "each field once")
    for name, value in fields.items():
        # Which object lacks a name cannot be told.
        if isinstance(value, list) and len({frozenset(item) for item in value if isinstance(item, dict)}) > 1:
            raise InvalidInput(name[:80], "objects with different names", "the same names in each, or one JSON text")
    return fields


def _put(into: dict[str, Any], path: list[str], text: str) -> bool:
    """Puts `text` where `path` leads, "" being the next place of a list. Whether that place was free."""
    key, *rest = path
    if not rest:
        free = key not in into
        into.setdefault(key, text)
        return free
    if rest[0] != "":
        inner = into.setdefault(key, {})
        return isinstance(inner, dict) and _put(inner, rest, text)
    items = into.setdefault(key, [])
    if not isinstance(items, list):
        return False
    if not rest[1:]:
        items.append(text)
        return True
    # The n-th value of a name is the n-th object's: OpenAI's client sends all values of a name together, others one
    # object after the other.
    if any(isinstance(item, dict) and _put(item, rest[1:], text) for item in items):
        return True
    items.append({})
    return _put(items[-1], rest[1:], text)
