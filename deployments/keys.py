"""Who may ask: API keys, in one JSON file that holds no secret. `helios keys add | list | revoke` looks after it.

A key is shown once, when it is made; the file has its SHA-256. 256 random bits need no salt and no slow hash: nobody
guesses them. A service reads the file again when it changes; from one that it cannot read it takes nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import typer
from pydantic import Field
from rich.console import Console

from deployments.config import ConfigError, Quota, Settings
from helios_core.errors import InvalidInput

logger = logging.getLogger(__name__)

app = typer.Typer(no_args_is_help=True, help="The API keys of a service, in a file.")
console = Console(stderr=True, highlight=False, soft_wrap=True)

OWNER = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"


class Key(Settings):
    """One key. `owner`: whose videos it sees; keys of one owner see the same. `kind`: a key for `metrics` opens nothing
    else, one for `videos` all but that. `created_at`: Unix time; `quota`: in place of the configuration's."""

    id: str = Field(pattern=r"^key_[0-9a-f]{12}$")
    owner: str = Field(pattern=f"^{OWNER}$")
    kind: Literal["videos", "metrics"]
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created_at: int
    quota: Quota | None = None

    def sign(self, video_id: str, expires: int) -> str:
        """What makes a link to a video good until the Unix time `expires`, and as long as there is this key."""
        said = f"{video_id} {expires}"
        return hmac.new(bytes.fromhex(self.sha256), said.encode(), hashlib.sha256).hexdigest()


class KeyFile(Settings):
    keys: tuple[Key, ...] = ()

    @pydantic.field_validator("keys")
    @classmethod
    def _each_once(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        for what, of_each in (("id", [key.id for key in keys]), ("sha256", [key.sha256 for key in keys])):
            if len(set(of_each)) < len(of_each):
                raise ValueError(f"the same {what} is there twice; allowed: each once")
        return keys


class Keys:
    """The keys in a file, as it is now, or as it last could be read. Raises ConfigError if it never could."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keys = read_keys(path)

    def of(self, token: str) -> Key | None:
        """The key that is `token`. It takes as long whichever it is, and whether it is one or none."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for key in self._current():
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def signer(self, key_id: str) -> Key | None:
        """The key with this id, which may sign links to its owner's videos."""
        return next((key for key in self._current() if key.id == key_id and key.kind == "videos"), None)

    def _current(self) -> Sequence[Key]:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = read_keys(self._path)
                logger.info("keys read again", extra={"path": str(self._path), "keys": len(self._keys)})
            except ConfigError as error:
                logger.error("keys not read again, the ones before stay: %s", error)
        return self._keys


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in the file at `path`. Raises ConfigError, which names the file and what is wrong with it."""
    try:
        return KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{path}: keys cannot be read: {error.strerror}") from None
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False)[0]  # what is there in place of a digest may be a key
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: no file of keys: {where or 'the whole'}: {first['msg']}") from None


def new_key(owner: str | None, kind: Literal["videos", "metrics"], quota: Quota | None) -> tuple[str, Key]:
    """A new key, as its holder sends it and as the file has it. `owner`: None for one of its own."""
    token, key_id = "helios_" + secrets.token_urlsafe(32), "key_" + secrets.token_hex(6)
    digest = hashlib.sha256(token.encode()).hexdigest()
    key = Key(id=key_id, owner=owner or key_id, kind=kind, sha256=digest, created_at=int(time.time()), quota=quota)
    return token, key


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was written again or put in another's place; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """The keys in a file, none if it is not there, to be changed in the block, one change at a time. Whoever reads it
    meanwhile finds the old ones or the new ones. Raises ConfigError."""
    try:
        path = path.resolve()  # a link goes on leading there
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            before = path.stat() if path.exists() else None
            keys = list(read_keys(path)) if before else []
            yield keys
            _replace(path, KeyFile(keys=tuple(keys)).model_dump_json(indent=2, exclude_none=True) + "\n", before)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"{path}: keys cannot be written: {error.strerror}") from None


def _replace(path: Path, text: str, before: os.stat_result | None) -> None:
    """Puts a file in the place of another one, for the same eyes: else a service of another user could not read that a
    key was revoked. Where there was none, it is for its owner alone."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".keys-", delete=False) as file:  # mode 600
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            if before is not None:
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


File = Annotated[Path, typer.Option("--file", envvar="HELIOS_KEYS", help="JSON file of the keys")]
FILE = Path("helios-keys.json")


@app.command()
def add(
    owner: Annotated[str | None, typer.Option(help="whose videos it sees; by default its own alone")] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="a key for /metrics, and for nothing else")] = False,
    concurrent_videos: Annotated[int | None, typer.Option(help="videos at once that have not ended")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="requests")] = None,
    seconds_per_day: Annotated[float | None, typer.Option(help="seconds of video in any 24 hours")] = None,
    file: File = FILE,
) -> None:
    """Make a key and print it. It is shown this once. Limits that are not given are those of the configuration."""
    limits = {
        "concurrent_videos": concurrent_videos,
        "requests_per_minute": requests_per_minute,
        "seconds_per_day": seconds_per_day,
    }
    given = {name: value for name, value in limits.items() if value is not None}
    try:
        quota = Quota(**given) if given else None  # type: ignore[arg-type]
        token, key = new_key(owner, "metrics" if metrics else "videos", quota)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(str(first["loc"][0]), first["input"], first["msg"]) from None
    with _changing(file) as keys:
        keys.append(key)
    console.print(f"{file}: {key.id} added, of {key.owner}", markup=False)
    typer.echo(token)


@app.command("list")
def list_keys(file: File = FILE) -> None:
    """List the keys: id, kind, owner, when each was made, limits. The keys themselves are nowhere."""
    rows = [("id", "kind", "owner", "made", "limits")]
    for key in read_keys(file):
        made = datetime.fromtimestamp(key.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
        limits = {} if key.quota is None else key.quota.model_dump(exclude_none=True)
        told = ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "the configuration's"
        rows.append((key.id, key.kind, key.owner, made, told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


@app.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="as `list` has it")], file: File = FILE) -> None:
    """Remove a key. It opens nothing from the next request on, and the links that it signed neither."""
    with _changing(file) as keys:
        left = [key for key in keys if key.id != key_id]
        if len(left) == len(keys):
            raise InvalidInput("ID", key_id, f"one of {', '.join(key.id for key in keys) or 'none: there is no key'}")
        keys[:] = left
    console.print(f"{file}: {key_id} revoked", markup=False)
