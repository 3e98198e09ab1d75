"""What every file says of how it came about: that a trained model made it, in the words of the IPTC, as XMP.

Whoever shows or collects pictures looks for it there (IPTC Photo and Video Metadata; XMP, ISO 16684-1). It says nothing
else: no prompt, no id, no time, so that it is the same in every file.
"""

from __future__ import annotations

import struct

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
).encode()

_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
XMP_BOX = struct.pack(">I4s", 8 + len(_XMP_UUID) + len(XMP), b"uuid") + _XMP_UUID + XMP
"""XMP as a box of an MP4 file, where XMP's specification (part 3) has it: beside the others, in none of them."""
