"""What files say of how they came about, as others read it: FFmpeg, Pillow, and a parser of XML.

ExifTool 12.57 shows it of both too, as XMP-iptcExt:DigitalSourceType.
"""

from __future__ import annotations

import io
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from PIL import Image

from helios_core.media.fragments import Fragment, encode_fragment, encode_jpeg
from tests.core.media_files import i420, quarters

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
MADE_BY_AI = {
    f"{RDF}about": "",
    "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType": (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    ),
}


def said(xmp: str | bytes) -> dict[str, str]:
    """All properties in a packet of XMP, which has one description, and nothing in it but these."""
    root = ElementTree.fromstring(xmp)
    (description,) = root.iter(f"{RDF}Description")
    assert "".join(root.itertext()) == "" and len(description) == 0
    return description.attrib


def said_of_video(file: bytes) -> dict[str, str]:
    with av.open(io.BytesIO(file), options={"export_xmp": "1"}) as container:
        return said(container.metadata["xmp"])


def said_of_picture(file: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(file)) as picture:
        return said(picture.info["xmp"])


@pytest.fixture(scope="module")
def fragment() -> Fragment:
    frames = np.stack([np.asarray(quarters(64, 64))] * 3)
    return encode_fragment(i420(frames), chunk_index=0, first_frame=0, fps=24)


def test_a_video_says_that_it_was_made_by_ai(fragment: Fragment) -> None:
    assert said_of_video(fragment.init + fragment.data) == MADE_BY_AI


def test_a_picture_says_that_it_was_made_by_ai() -> None:
    file = encode_jpeg(i420(np.asarray(quarters(64, 64))[None])[0])
    assert said_of_picture(file) == MADE_BY_AI


def test_the_init_segment_says_nothing_else(fragment: Fragment) -> None:
    """No name and no version of a library either: another one would make another init segment of the same video."""
    with av.open(io.BytesIO(fragment.init + fragment.data)) as container:
        assert set(container.metadata) == {"major_brand", "minor_version", "compatible_brands"}
    assert b"Lavf" not in fragment.init
