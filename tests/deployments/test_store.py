"""The store, in a folder and on S3: what a Director, a replica and a second service rely on."""

from __future__ import annotations

import asyncio
import hashlib
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import obstore
import pytest

from deployments.records import (
    ChunkRecord,
    StoredObject,
    Timings,
    VideoRecord,
    VideoRequestRecord,
)
from deployments.store import (
    CLAIM_HOLDS_S,
    ObjectMissing,
    Store,
    StoreInUse,
    StoreUnavailable,
    is_video_id,
    new_video_id,
    renamed,
)
from helios_core.errors import InvalidInput
from helios_core.spec import VideoSpec

ROOT = Path(__file__).parents[2]
ID = "video_0193f0a1b2c3" + "0123456789abcdef0123"
SPEC = VideoSpec(
    prompt="a red fox in snow ❄",
    model="random",
    width=128,
    height=128,
    seconds=2.0,
    seed=42,
    steps=(2, 2, 2),
    amplify_first_chunk=True,
)


def request(video_id: str = ID) -> VideoRequestRecord:
    return VideoRequestRecord(id=video_id, created_at=1.5, spec=SPEC, traceparent="00-ab-cd-01")


def record(*chunks: ChunkRecord) -> VideoRecord:
    return VideoRecord(id=ID, created_at=1.5, spec=SPEC, status="in_progress", chunks=chunks)


async def render(store: Store, index: int, term: int) -> ChunkRecord:
    """What a VAE replica does for one chunk, with a few bytes in place of video."""
    return ChunkRecord(
        index=index,
        frames=33,
        steps=6,
        fragment=await store.put_fragment(ID, index, term, b"fragment %d of term %d" % (index, term)),
        state=await store.put_state(ID, index + 1, term, b"state %d of term %d" % (index + 1, term)),
        timings=Timings(sample_started_at=0, sample_seconds=0, decode_seconds=0, encode_seconds=0, store_seconds=0),
    )


def keys(store: Store) -> list[str]:
    """Of all that lies in a store; in a folder also of what listings hide."""
    if store.folder is not None:
        return sorted(str(path.relative_to(store.folder)) for path in store.folder.rglob("*") if path.is_file())
    return sorted(item["path"] for part in obstore.list(store._objects) for item in part)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a folder that does not exist yet" / "helios-data"


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest) -> Store:
    return Store(str(request.getfixturevalue(request.param)))


IN_A_FOLDER = pytest.mark.parametrize("store", ["folder"], indirect=True)  # for tests that look into it


# What lies where


async def test_the_keys_of_a_video_of_two_chunks(store: Store) -> None:
    term = await store.claim_term()
    await store.accept(request())
    await store.put_text(ID, "5f" * 32, b"embeddings")
    await store.put_init(ID, b"ftyp moov")
    chunks = [await render(store, k, term) for k in range(2)]
    await store.put_record(record(*chunks), term)
    assert keys(store) == [
        f"active/{ID}",
        "terms/000001",
        f"videos/{ID}/chunks/00000.t1.m4s",
        f"videos/{ID}/chunks/00001.t1.m4s",
        f"videos/{ID}/init.mp4",
        f"videos/{ID}/record.t1.json",
        f"videos/{ID}/request.json",
        f"videos/{ID}/states/00001.t1.safetensors",
        f"videos/{ID}/states/00002.t1.safetensors",
        f"videos/{ID}/texts/{'5f' * 32}.safetensors",
    ]


async def test_a_put_tells_key_length_and_digest_of_what_can_be_read(store: Store) -> None:
    data = bytes(range(256)) * 30_000  # 7.7 MB: more than obstore puts in one request unless it is told to
    put = await store.put_state(ID, 8, 3, data)
    assert put == StoredObject(
        key=f"videos/{ID}/states/00008.t3.safetensors", bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    assert await store.read(put.key) == data


async def test_ranges_are_read_as_python_slices(store: Store) -> None:
    key = (await store.put_init(ID, b"0123456789")).key
    assert await store.read(key, 4) == b"456789"
    assert await store.read(key, 0, 4) == b"0123"
    assert await store.read(key, 3, 4) == b"3"
    assert await store.read(key, 8, 100) == b"89"


async def test_reading_what_does_not_exist_names_store_and_key(store: Store) -> None:
    with pytest.raises(ObjectMissing, match=f"{store.url}: there is no videos/{ID}/init.mp4"):
        await store.read(f"videos/{ID}/init.mp4")


# Requests and the active marker


async def test_a_request_is_stored_and_active_until_it_ends(store: Store) -> None:
    assert await store.request(ID) is None
    assert await store.active() == []
    await store.accept(request())
    assert await store.request(ID) == request()
    assert await store.active() == [ID]
    await store.end(ID)
    await store.end(ID)  # a repeated end is no error
    assert await store.active() == []
    assert await store.request(ID) == request()


@IN_A_FOLDER
async def test_a_request_whose_acceptance_broke_off_is_not_active(store: Store, folder: Path) -> None:
    folder.joinpath("active").write_text("in the way: the marker cannot be written")
    with pytest.raises(StoreUnavailable):
        await store.accept(request())
    assert await store.request(ID) == request()  # the request came first
    folder.joinpath("active").unlink()
    assert await store.active() == []


async def test_videos_are_listed_newest_first_and_active_ones_oldest_first(store: Store) -> None:
    ids = [new_video_id(now) for now in (30.0, 10.0, 20.001, 20.002)]
    for video_id in ids:
        await store.accept(request(video_id))
    assert await store.video_ids() == [ids[0], ids[3], ids[2], ids[1]]
    assert await store.active() == [ids[1], ids[2], ids[3], ids[0]]


# Terms and the commit


async def test_concurrent_claims_never_get_the_same_term(store: Store) -> None:
    stores = [store, Store(store.url)]
    assert await stores[0].newest_term() == 0
    terms = await asyncio.gather(*(stores[i % 2].claim_term() for i in range(20)))
    assert sorted(terms) == list(range(1, 21))
    assert await stores[1].newest_term() == 20


async def test_the_record_of_the_highest_term_counts(store: Store) -> None:
    assert await store.record(ID) is None
    by_term = {}
    for term in (9, 10, 2):  # 10 is higher than 9, though not as text; and an old writer may be the last to write
        by_term[term] = record(await render(store, 0, term))
        await store.put_record(by_term[term], term)
    assert await store.record(ID) == by_term[10]


async def test_a_later_commit_of_the_same_term_replaces_the_earlier(store: Store) -> None:
    first, second = await render(store, 0, 1), await render(store, 1, 1)
    await store.put_record(record(first), 1)
    await store.put_record(record(first, second), 1)
    assert await store.record(ID) == record(first, second)


async def test_an_old_term_overwrites_no_object_of_a_newer_one(store: Store) -> None:
    newer = await render(store, 0, 4)
    await render(store, 0, 3)
    assert await store.read(newer.fragment.key) == b"fragment 0 of term 4"
    assert await store.read(newer.state.key) == b"state 1 of term 4"


async def test_earlier_states_go_when_a_later_one_is_committed(store: Store) -> None:
    term = await store.claim_term()
    chunks = [await render(store, k, term) for k in range(3)]
    await store.put_state(ID, 4, term, b"rendered, but not committed yet")
    await store.put_state(ID, 1, 7, b"left by another term")
    await store.keep_only_last_state(record(*chunks), term)
    states = {f"videos/{ID}/states/0000{seen}.t1.safetensors" for seen in (3, 4)}
    assert await store.states(ID) == states
    assert await store.read(chunks[0].fragment.key) == b"fragment 0 of term 1"


async def test_states_stay_when_a_newer_term_leads(store: Store) -> None:
    term = await store.claim_term()
    chunks = [await render(store, k, term) for k in range(2)]
    await store.claim_term()  # another Director: it may resume from the first chunk's state
    await store.keep_only_last_state(record(*chunks), term)
    assert await store.read(chunks[0].state.key) == b"state 1 of term 1"


async def test_an_ended_video_keeps_what_its_record_names(store: Store) -> None:
    term = await store.claim_term()
    chunks = [await render(store, k, term) for k in range(3)]
    await store.put_fragment(ID, 3, term, b"rendered, and never committed")
    await store.put_state(ID, 4, term, b"rendered, and never committed")
    await store.put_fragment(ID, 1, 7, b"left by another term")

    def names(kind: str) -> list[str]:
        return [Path(key).name for key in keys(store) if f"/{kind}/" in key]

    await store.sweep(record(*chunks), term, all_states=True)
    assert names("states") == [f"0000{k}.t1.safetensors" for k in (1, 2, 3)]
    await store.sweep(record(*chunks), term)
    assert (names("chunks"), names("states")) == (
        [f"0000{k}.t1.m4s" for k in range(3)],
        ["00003.t1.safetensors"],
    )
    await store.claim_term()
    await store.sweep(record(), term)  # its Director leads no more
    assert names("chunks")


# Copies

OTHER = "video_0193f0a1b2c4" + "0123456789abcdef0123"


async def test_a_copy_is_the_same_object_under_another_video(store: Store, tmp_path: Path) -> None:
    """Under the term that copies it, where a name has one."""
    tmp_path.joinpath("upload").write_bytes(b"an image")
    items = {
        await store.put_fragment(ID, 7, 3, b"fragment"): "chunks/00007.t12.m4s",
        await store.put_state(ID, 8, 3, b"state"): "states/00008.t12.safetensors",
        await store.put_init(ID, b"init"): "init.mp4",
        await store.put_thumbnail(ID, b"jpeg"): "thumbnail.jpg",
        await store.put_input(ID, tmp_path / "upload"): "input",
    }
    for item, name in items.items():
        copied = await store.copy(item, OTHER, 12)
        assert copied == item.model_copy(update={"key": f"videos/{OTHER}/{name}"}) == renamed(item, OTHER, 12)
    assert await store.states(OTHER) == {f"videos/{OTHER}/states/00008.t12.safetensors"}
    await store.delete(ID)
    assert await store.states(ID) == set()
    for item in items:
        data = await store.read(renamed(item, OTHER, 12).key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (item.bytes, item.sha256)
    assert keys(store) == sorted(f"videos/{OTHER}/{name}" for name in items.values())


async def test_a_copy_does_not_change_with_its_source(store: Store) -> None:
    copied = await store.copy(await store.put_init(ID, b"before"), OTHER, 1)
    await store.put_init(ID, b"after")
    assert await store.read(copied.key) == b"before"
    await store.put_init(OTHER, b"new")
    assert await store.read(f"videos/{ID}/init.mp4") == b"after"


async def test_what_is_not_there_cannot_be_copied(store: Store) -> None:
    item = await store.put_init(ID, b"init")
    await store.delete(ID)
    with pytest.raises(ObjectMissing, match=f"there is no videos/{ID}/init.mp4"):
        await store.copy(item, OTHER, 1)
    with pytest.raises(InvalidInput):
        await store.copy(item, "../x", 1)
    assert keys(store) == [] and not await store.has(OTHER)


async def test_a_video_that_is_prepared_is_active_and_has_no_request(store: Store) -> None:
    await store.prepare(ID)
    assert (await store.active(), await store.request(ID)) == ([ID], None)
    await store.accept(request())
    assert await store.active() == [ID]


@IN_A_FOLDER
async def test_files_of_strangers_are_not_taken_for_ours(store: Store, folder: Path) -> None:
    term = await store.claim_term()
    await store.accept(request())
    chunks = [await render(store, k, term) for k in range(2)]
    await store.put_record(record(*chunks), term)
    for place in ("terms", "active", "videos", f"videos/{ID}", f"videos/{ID}/states"):
        folder.joinpath(place, ".DS_Store").write_bytes(b"Finder was here")
    folder.joinpath("videos/lost+found").mkdir()
    await store.keep_only_last_state(record(*chunks), term)
    assert (await store.active(), await store.video_ids()) == ([ID], [ID])
    assert await store.record(ID) == record(*chunks)
    assert await store.claim_term() == term + 1


# Claims of Idempotency-Keys


async def test_a_key_is_claimed_by_one_settled_followed_and_forgotten(store: Store) -> None:
    now = time.time()
    ids = [new_video_id(now) for _ in range(8)]
    claims = await asyncio.gather(*(store.claim("", "a key", "digest", each, now) for each in ids))
    assert set(claims) == {claims[0]} and claims[0].video_id in ids
    await store.settle("", "a key", claims[0], "refused")
    follower = await store.claim("", "a key", "another digest", ids[0], now)
    assert (follower.number, await store.claimed("", "a key", now)) == (2, follower)
    await store.forget_claims(now + CLAIM_HOLDS_S)
    assert len(keys(store)) == 2
    await store.forget_claims(now + 3 * CLAIM_HOLDS_S)
    assert keys(store) == []


# What is listed, and what is removed


async def test_what_is_stored_is_listed_with_its_size_and_time(store: Store) -> None:
    before = int(time.time())
    fragment = await store.put_fragment(ID, 7, 3, b"fragment")
    await store.prepare(ID)
    (listed,) = await store.objects(ID)
    assert (listed.key, listed.bytes, listed.kind, listed.term) == (fragment.key, 8, "fragment", 3)
    marker = await store.marker(ID)
    assert marker is not None and marker.key == f"active/{ID}"
    assert before <= listed.modified_at <= marker.modified_at <= time.time()
    await store.end(ID)
    assert await store.marker(ID) is None


async def test_what_is_gone_already_keeps_nothing_else_from_removal(store: Store) -> None:
    there = [(await store.put_fragment(ID, k, 1, b"fragment")).key for k in range(1, 20)]
    await store._delete([f"videos/{ID}/chunks/00000.t1.m4s", *there])
    assert keys(store) == []


# Atomic puts


@IN_A_FOLDER
async def test_what_a_killed_writer_leaves_behind_is_no_object(store: Store, folder: Path) -> None:
    whole = record(await render(store, 0, 1))
    await store.put_record(whole, 1)
    half = folder / f"videos/{ID}/record.t2.json#1"  # obstore's name for a put in progress
    half.write_text('{"id":')
    assert await store.record(ID) == whole
    await store.put_record(whole, 2)
    assert await store.read(f"videos/{ID}/record.t2.json") == whole.model_dump_json().encode()


async def test_a_reader_never_sees_a_part_of_a_put(store: Store) -> None:
    size = 4_000_000
    versions = [bytes([value]) * size for value in b"ab"]
    key = (await store.put_init(ID, versions[0])).key
    writing = True

    async def write() -> None:
        nonlocal writing
        for i in range(20):
            await store.put_init(ID, versions[i % 2])
        writing = False

    async def read() -> Counter[tuple[int, bytes]]:
        seen: Counter[tuple[int, bytes]] = Counter()
        while writing:
            data = await store.read(key)
            seen[len(data), bytes(set(data))] += 1
        return seen

    _, seen = await asyncio.gather(write(), read())
    assert set(seen) <= {(size, b"a"), (size, b"b")}
    assert seen.total() > 0


# Ids


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = [new_video_id(1_763_000_000 + i / 1000) for i in range(50)]
    assert ids == sorted(ids)
    assert all(map(is_video_id, ids))
    assert len({new_video_id(1_763_000_000.0) for _ in range(1000)}) == 1000


NOT_IDS = [
    "",
    "video_",
    ID[:-1],
    ID + "0",
    ID + "\n",
    ID.upper(),
    ID.replace("0123", "٠١٢٣"),  # digits, but not ASCII
    "../" + ID,
    f"{ID}/../{ID}",
    "/etc/passwd",
    "video_" + "../" * 10 + "ab",
    ID[:-1] + "\0",
]


@IN_A_FOLDER
@pytest.mark.parametrize("text", NOT_IDS)
async def test_a_text_that_is_no_id_never_reaches_a_path(store: Store, folder: Path, text: str) -> None:
    assert not is_video_id(text)
    for call in (
        store.accept(request(text)),
        store.request(text),
        store.end(text),
        store.record(text),
        store.put_record(record().model_copy(update={"id": text}), 1),
        store.put_init(text, b""),
        store.put_fragment(text, 0, 1, b""),
        store.put_state(text, 1, 1, b""),
        store.put_text(text, "5f", b""),
        store.put_thumbnail(text, b""),
        store.put_input(text, folder),
        store.prepare(text),
        store.copy(StoredObject(key=f"videos/{ID}/init.mp4", bytes=0, sha256=""), text, 1),
        store.sweep(record().model_copy(update={"id": text}), 0),
        store.has(text),
    ):
        with pytest.raises(InvalidInput, match=r"^id is "):
            await call
    assert keys(store) == []


# One service per folder

HOLD = """
import sys
from deployments.store import Store, StoreInUse
try:
    with Store(sys.argv[1]).lock():
        sys.stdout.write("held\\n")
        sys.stdout.flush()
        sys.stdin.read()
except StoreInUse as error:
    raise SystemExit(str(error))
"""


def hold_elsewhere(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@IN_A_FOLDER
def test_a_second_service_on_one_folder_is_refused(store: Store, folder: Path) -> None:
    with store.lock():
        _, message = hold_elsewhere(folder).communicate(timeout=120)
        assert f"the folder {folder} is in use by another Helios service" in message
    with store.lock():  # released, it can be taken again
        pass


@IN_A_FOLDER
def test_a_killed_service_frees_its_folder(store: Store, folder: Path) -> None:
    with hold_elsewhere(folder) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreInUse), store.lock():
            pass
        other.kill()
        other.wait(timeout=60)
        with store.lock():
            pass


@IN_A_FOLDER
async def test_the_lock_hides_nothing_from_other_processes_of_the_service(store: Store, folder: Path) -> None:
    with store.lock():
        await store.accept(request())
        assert await Store(str(folder)).active() == [ID]


# URLs and failures


async def test_a_store_travels_by_its_url(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    relative = Store("here")
    await relative.accept(request())
    sent = pickle.dumps(relative)
    monkeypatch.chdir("/")  # a replica has a working directory of its own
    assert await pickle.loads(sent).active() == [ID]  # noqa: S301 - our own bytes
    assert keys(relative) == [f"active/{ID}", f"videos/{ID}/request.json"]


async def test_a_file_url_is_the_folder_that_it_names(tmp_path: Path) -> None:
    await Store((tmp_path / "with space").as_uri()).accept(request())
    assert await Store(str(tmp_path / "with space")).active() == [ID]


@pytest.mark.parametrize("url", ["http://example.com/x", "memory://", "redis://localhost"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="allowed: a folder, file://, s3://, gs:// or az://"):
        Store(url)


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    tmp_path.joinpath("file").write_text("not a folder")
    with pytest.raises(StoreUnavailable, match=f"^{tmp_path}/file/data: "):
        Store(str(tmp_path / "file" / "data"))


@IN_A_FOLDER
def test_a_folder_that_went_bad_is_unavailable(store: Store, folder: Path) -> None:
    folder.rmdir()
    folder.write_text("not a folder any more")
    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(store.put_init(ID, b"data"))
    assert caught.value.code == "store_unavailable"
    assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


async def test_a_bucket_that_cannot_be_reached_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "test")
    store = pickle.loads(pickle.dumps(Store("s3://bucket/cell-1")))  # noqa: S301 - our own bytes
    assert store.url == "s3://bucket/cell-1"
    with store.lock():  # a bucket has none: nothing to hold, nothing to refuse
        with pytest.raises(StoreUnavailable, match=r"^s3://bucket/cell-1: .*error sending request"):
            await store.claim_term()
