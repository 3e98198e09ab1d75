"""The file of keys: what is in it, what the command line does with it, and what becomes of a broken one."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deployments import keys
from deployments.cli import app
from deployments.config import AppConfig, ConfigError, Quota
from deployments.keys import Key, Keys, new_key, read_keys

Helios = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def helios(file: Path) -> Helios:
    """`helios keys …` on the file: what it prints."""

    def run(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["keys", *arguments, "--file", str(file)])
        assert result.exit_code == status, result.output
        return result.stdout.strip()

    return run


def put(file: Path, *some: Key) -> None:
    """As an editor or a mounted Secret would: another file in its place."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps({"keys": [key.model_dump() for key in some]}))
    new.replace(file)


def test_a_key_is_shown_once_and_the_file_has_its_digest(helios: Helios, file: Path) -> None:
    token = helios("add", "--owner", "acme", "--concurrent-videos", "2", "--seconds-per-day", "90.5")
    assert token.startswith("helios_") and len(token) == len("helios_") + 43  # 256 bits in base64
    (key,) = read_keys(file)
    assert token not in file.read_text()
    assert key.sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert (key.owner, key.kind) == ("acme", "videos")
    assert key.quota == Quota(concurrent_videos=2, seconds_per_day=90.5)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Keys(file).of(token) == key
    told = helios("list")
    assert key.id in told and "concurrent_videos 2, seconds_per_day 90.5" in told and key.sha256 not in told


def test_a_change_leaves_the_file_to_those_who_could_read_it(helios: Helios, file: Path, tmp_path: Path) -> None:
    """A service of another user, that reads it by a link."""
    helios("add")
    os.chmod(file, 0o640)
    if os.geteuid() == 0:
        os.chown(file, 1234, 1235)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    before, (key,) = file.stat(), read_keys(file)
    revoked = CliRunner().invoke(app, ["keys", "revoke", key.id, "--file", str(link)])
    assert revoked.exit_code == 0 and link.is_symlink() and read_keys(link) == read_keys(file) == ()
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_each_key_has_an_owner_of_its_own_unless_it_is_told(helios: Helios, file: Path) -> None:
    helios("add")
    helios("add")
    helios("add", "--metrics")
    one, other, metrics = read_keys(file)
    assert one.owner == one.id and other.owner == other.id and one.id != other.id
    assert metrics.kind == "metrics"


def test_a_revoked_key_opens_nothing_more_and_the_others_do(helios: Helios, file: Path) -> None:
    gone, stays = helios("add"), helios("add")
    known = Keys(file)
    key = known.of(gone)
    assert key is not None
    helios("revoke", key.id)
    assert known.of(gone) is None and known.signer(key.id) is None
    assert known.of(stays) is not None
    helios("revoke", key.id, status=1)


@pytest.mark.parametrize(
    "option, value",
    [("--owner", "a b"), ("--owner", "x" * 65), ("--concurrent-videos", "0"), ("--seconds-per-day", "nan")],
)
def test_what_cannot_be_is_refused_and_makes_no_file(helios: Helios, file: Path, option: str, value: str) -> None:
    helios("add", option, value, status=1)
    assert not file.exists()


def test_two_who_add_at_once_lose_nothing(file: Path) -> None:
    def add(_: int) -> None:
        _, key = new_key(None, "videos", None)
        with keys._changing(file) as some:
            some.append(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert len(read_keys(file)) == 40
    assert os.listdir(file.parent) == [file.name]


BROKEN = {
    "not JSON": b"{",
    "no object": b"[]",
    "an unknown setting": b'{"keys": [], "kyes": []}',
    "a key without its digest": b'{"keys": [{"id": "key_000000000000", "owner": "a", "kind": "videos"}]}',
    "not UTF-8": b"\xff\xfe",
    "empty, as while it is written": b"",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_told_and_the_keys_before_stay(
    file: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    token, key = new_key("acme", "videos", None)
    put(file, key)
    known = Keys(file)
    file.write_bytes(BROKEN[what])
    for _ in range(3):
        assert known.of(token) == key
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert str(file) in told.getMessage() and "stay" in told.getMessage()
    with pytest.raises(ConfigError, match=str(file)):  # a service that starts has no keys before
        Keys(file)
    token_2, key_2 = new_key("acme", "videos", None)
    put(file, key_2)
    assert known.of(token) is None and known.of(token_2) == key_2


@pytest.mark.parametrize("how", ["gone", "a folder", "unreadable"])
def test_an_unreadable_file_is_told_and_the_keys_before_stay(
    file: Path, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, key = new_key("acme", "videos", None)
    put(file, key)
    known = Keys(file)
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "unreadable":  # root may read whatever its mode says: a link to itself nobody can
        file.symlink_to(file)
    assert known.of(token) == key and known.of("helios_x") is None
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    with pytest.raises(ConfigError, match="keys cannot be read"):
        Keys(file)


def test_two_keys_with_one_id_or_digest_are_refused(file: Path) -> None:
    _, key = new_key("acme", "videos", None)
    _, other = new_key("acme", "videos", None)
    for twin in (key.model_copy(update={"id": other.id}), key.model_copy(update={"sha256": other.sha256})):
        put(file, twin, other)
        with pytest.raises(ConfigError, match="twice"):
            read_keys(file)


def test_a_message_never_has_what_might_be_a_key(file: Path) -> None:
    token, key = new_key("acme", "videos", None)
    file.write_text(json.dumps({"keys": [{**key.model_dump(), "sha256": token}]}))
    with pytest.raises(ConfigError) as error:
        read_keys(file)
    assert token not in str(error.value) and "keys.0.sha256" in str(error.value)


@pytest.mark.parametrize(
    "settings, safe",
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "::"}, False),
        ({"haproxy": True}, False),
        ({"host": "0.0.0.0", "insecure": True}, True),
        ({"host": "0.0.0.0", "keys": "keys.json"}, True),
    ],
)
def test_strangers_come_in_only_if_somebody_says_so(settings: dict[str, object], safe: bool) -> None:
    config = AppConfig().override(**settings)
    if safe:
        return config.check_door()
    with pytest.raises(ConfigError, match="--insecure"):
        config.check_door()


def test_serve_refuses_an_open_host_and_a_broken_file_in_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deployments.cli import main

    def no_ray(**_: object) -> None:
        raise AssertionError("Ray was to be started")

    monkeypatch.setattr("ray.init", no_ray)
    file.write_text("{")
    for options in (
        ["--host", "0.0.0.0"],
        ["--host", "0.0.0.0", "--keys", str(file)],
        ["--keys", str(tmp_path / "no")],
    ):
        serve = ["helios", "serve", "--model", "random", "--store", str(tmp_path / "store"), *options]
        monkeypatch.setattr(sys, "argv", serve)
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr().err
        assert end.value.code == 1 and told.startswith("helios: ") and "Traceback" not in told
