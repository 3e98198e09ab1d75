"""The page's files, as the service sends them. What they do in a browser is in test_page.py."""

from __future__ import annotations

import re

import pytest

from deployments.page import PLAYER, POLICY
from tests.deployments.conftest import LocalService

PAGE = (PLAYER / "index.html").read_text()


async def test_every_file_comes_under_the_policy(service: LocalService) -> None:
    page = await service.http.get("/")
    assert (page.status_code, page.headers["content-type"], page.text) == (200, "text/html; charset=utf-8", PAGE)
    answers = {"/": page}
    wanted = [f"/{name}" for name in re.findall(r'(?:href|src)="(player/[^"]+)"', PAGE)]
    while wanted:
        name = wanted.pop()
        if name not in answers:
            answers[name] = await service.http.get(name)
            wanted += [f"/player/{module}" for module in re.findall(r'from "\./([^"]+)"', answers[name].text)]
    assert {name.removeprefix("/player/") for name in answers if name != "/"} == {
        file.name for file in PLAYER.iterdir() if file.name != "index.html"
    }
    for name, answer in answers.items():
        assert answer.status_code == 200, name
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = await service.http.get(name, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
        assert again.headers["content-security-policy"] == POLICY
    assert "text/javascript" in answers["/player/main.js"].headers["content-type"]


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    assert "unsafe" not in POLICY and "http" not in POLICY
    assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\bstyle=|\bon[a-z]+=|javascript:", PAGE)
    for file in PLAYER.iterdir():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file.name


async def test_it_takes_no_place_of_the_api(service: LocalService) -> None:
    assert (await service.http.head("/")).status_code == 200
    assert (await service.http.post("/")).status_code == 405
    assert (await service.http.put("/v1/videos")).status_code == 405
    for path in ("/player/none.js", "/player/../page.py", "/v1/none"):
        answer = await service.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/", "/player/main.js"])
@pytest.mark.parametrize("asked", ["bytes=0-3", "bytes=a-b", "bytes=999999999-", "lines=1-2"])
async def test_its_files_are_sent_whole(service: LocalService, path: str, asked: str) -> None:
    """Whatever part is asked for, with no refusal that is not in the contract."""
    whole = await service.http.get(path)
    answer = await service.http.get(path, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, whole.content)
    again = await service.http.get(path, headers={"If-None-Match": whole.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
