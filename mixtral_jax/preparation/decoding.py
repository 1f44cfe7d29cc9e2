"""Bytes of a page to text, as browsers do it: by a byte order mark, by what is declared, else by a guess."""

import codecs
import re
from collections.abc import Iterable

from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Where Python's codec of a name knows less than what browsers take under that name (encoding.spec.whatwg.org).
WIDER = {"gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs", "iso8859-11": "cp874"}
UNMAPPED = {
    "x-mac-cyrillic": "mac-cyrillic", "x-mac-ukrainian": "mac-cyrillic", "x-user-defined": "cp1252", "uhc": "cp949",
    "cp949": "cp949",
}  # fmt: skip
# What a guess is believed to be. Other answers, such as Vietnamese or Celtic, are mostly short Western pages.
GUESSED = {
    "cp1250", "iso8859-2", "cp1251", "koi8-r", "koi8-u", "iso8859-5", "cp866", "cp1253", "iso8859-7", "cp1254",
    "cp1255", "iso8859-8", "cp1256", "cp874", "cp932", "euc_jp", "iso2022_jp", "gb18030", "big5hkscs", "cp949",
}  # fmt: skip
WESTERN = "cp1252"
SURE = 10  # characters of more than one byte for each broken one that make UTF-8 sure, whatever is declared
HEAD = 4096  # bytes in which a page may declare its encoding
COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
META = re.compile(rb"<meta\b([^>]*)", re.IGNORECASE)
ATTRIBUTE = re.compile(rb"([a-z-]+)\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+))", re.IGNORECASE)
XML = re.compile(rb"\s*<\?xml\b[^>]*?\bencoding\s*=\s*[\"']([^\"'>]+)", re.IGNORECASE)
CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([^\s\"';,]+)", re.IGNORECASE)


def decode(data: bytes, content_type: str = "", html: bool = False) -> tuple[str, str]:
    """Decodes a page or a text.

    Valid UTF-8 with more in it than ASCII counts as UTF-8 even where something else is declared: legacy text is never
    so by chance, and servers often declare what they do not send. Otherwise the order is that of browsers.

    Args:
        data: the bytes.
        content_type: header of HTTP, which may name a `charset`.
        html: whether the bytes may declare their encoding in a `meta` element or an XML declaration.

    Returns:
        The text, U+FFFD for what could not be decoded, and how the encoding was found.
    """
    for mark, codec in BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(codec, "replace"), "byte order mark"
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)  # leaves out what is cut at the end
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    whole = len(text) - len(text.encode("ascii", "ignore")) - broken
    other = not whole and (b"\x1b" in data or b"\0" in data)  # ISO-2022-JP and UTF-16 can look like ASCII
    repaired = "UTF-8 with replacements" if broken else "UTF-8"
    if whole >= SURE * broken and not other:
        return text, repaired
    for label, way in _declared(data, content_type, html):
        stated = codec_of(label)
        if stated and stated != "utf-8":
            found = data.decode(stated, "replace")
            if found.count("\ufffd") * SURE <= len(found) - len(found.encode("ascii", "ignore")):
                return found, way
    if whole >= broken and not other:
        return text, repaired
    guess = codec_of(detect_encoding(data, html5_compatible=False) or "")
    if not broken and guess != "iso2022_jp":
        return text, "UTF-8"
    return data.decode(guess if guess in GUESSED else WESTERN, "replace"), "guess"


def codec_of(label: str) -> str | None:
    """Python's name of the encoding that browsers take for a label; None if they know none."""
    label = label.strip().lower()
    codec = map_encoding_to_html5(label, fallback_utf8=False) or UNMAPPED.get(label)
    return WIDER.get(codec, codec) if codec else None


def _declared(data: bytes, content_type: str, html: bool) -> Iterable[tuple[str, str]]:
    if found := CHARSET.search(content_type):
        yield found[1], "HTTP header"
    if not html:
        return
    head = COMMENT.sub(b"", data[:HEAD])
    for element in META.finditer(head):
        values = {
            name.lower().decode(): (double or single or bare).decode("ascii", "replace")
            for name, double, single, bare in ATTRIBUTE.findall(element[1])
        }
        label = values.get("charset", "")
        if values.get("http-equiv", "").lower() == "content-type" and (
            stated := CHARSET.search(values.get("content", ""))
        ):
            label = label or stated[1]
        if label and not label.lower().startswith("utf-16"):  # it could not be read if it were
            yield label, "meta element"
    if declaration := XML.match(head):
        yield declaration[1].decode("ascii", "replace"), "XML declaration"
