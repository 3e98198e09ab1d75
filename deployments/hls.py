"""A video as HTTP Live Streaming (RFC 8216): a playlist of the very fragments that /content sends one after the other.

The playlist is of the type EVENT: it only grows, and what is in it stays. A failed or cancelled video ends with what
there is of it.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import Response

from deployments.content import FOREVER, LIVE_HEADERS, Reader, file_response
from deployments.door import link_of
from deployments.errors import RequestError
from deployments.records import News
from helios_core.config import CHUNK_FRAMES
from helios_core.errors import shown

PLAYLIST_TYPE = "application/vnd.apple.mpegurl"
SEGMENT_TYPE = "video/iso.segment"


def playlist(new: News, query: str = "") -> str:
    """All segments so far. `new`: what there is to see for one who has seen nothing; `query`: of each segment's
    address, as players pass none on."""
    query = query and f"?{query}"
    longest = -(-CHUNK_FRAMES // new.spec.fps)  # seconds, rounded up; the same from the first line to the last
    lines = [
        "#EXTM3U",
        "#EXT-X-VERSION:7",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        "#EXT-X-PLAYLIST-TYPE:EVENT",
        f"#EXT-X-TARGETDURATION:{longest}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-START:TIME-OFFSET=0",  # else players begin near the end of what is not over yet
    ]
    if new.chunks:
        lines.append(f'#EXT-X-MAP:URI="init.mp4{query}"')
    for chunk in new.chunks:
        lines += [f"#EXTINF:{chunk.frames / new.spec.fps},", f"{chunk.index}.m4s{query}"]
    if new.ended:
        lines.append("#EXT-X-ENDLIST")
    return "".join(f"{line}\n" for line in lines)


def playlist_response(request: Request, new: News) -> Response:
    """The playlist, which will never be another one once the video is completed."""
    body = playlist(new, link_of(request)).encode()
    headers = {"Cache-Control": FOREVER} if new.status == "completed" else LIVE_HEADERS
    headers = {**headers, "Content-Type": PLAYLIST_TYPE, "Content-Length": str(len(body))}
    return Response(b"" if request.method == "HEAD" else body, headers=headers)


def init_response(request: Request, new: News, store: Reader) -> Response:
    """The init segment. Raises RequestError 404 before there is one."""
    if new.init is None:
        raise RequestError(404, "not_found", "the video has no init segment yet; allowed: once its first chunk is made")
    return file_response(request, [new.init], store, whole=True)


def segment_response(request: Request, new: News, index: str, store: Reader) -> Response:
    """The fragment of a chunk. Raises RequestError 404 for a chunk that there is not, which names those that there
    are."""
    fragments = {str(chunk.index): chunk.fragment for chunk in new.chunks}
    if index not in fragments:
        allowed = f"0 to {len(fragments) - 1}" if fragments else "none yet"
        raise RequestError(404, "not_found", f"the segment is {shown(index)}; allowed: {allowed}")
    return file_response(request, [fragments[index]], store, whole=True, media_type=SEGMENT_TYPE)
