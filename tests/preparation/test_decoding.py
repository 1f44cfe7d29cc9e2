"""Pages in old encodings, with and without a word of which: the text comes back as it was written."""

import codecs

import pytest

from mixtral_jax.preparation.decoding import codec_of, decode
from tests.preparation.pages import TEXTS, archive, page, read

CASES = [(text, label) for text, labels in TEXTS.values() for label in labels]
LANGUAGES = [text for text, _ in TEXTS.values()]


@pytest.mark.parametrize(("text", "label"), CASES)
def test_the_declared_encoding_is_taken(text, label):
    data = page(text).encode(codec_of(label))
    assert decode(data, f"text/html; Charset='{label}'", html=True) == (page(text), "HTTP header")
    for head in (f"<META charset={label}>", f'<meta http-equiv=Content-Type content="text/html; charset={label}">'):
        data = page(text, head).encode(codec_of(label))
        assert decode(data, html=True) == (page(text, head), "meta element")
    data = f'<?xml version="1.0" encoding="{label}"?>{page(text)}'.encode(codec_of(label))
    assert decode(data, html=True)[1] == "XML declaration"
    assert page(text) in decode(data, html=True)[0]


@pytest.mark.parametrize(("text", "label"), CASES)
@pytest.mark.parametrize("stated", ["", "text/html; charset=utf-8", "text/html; charset=nonsense"])
def test_without_a_declaration_that_holds_a_guess_is_made(text, label, stated):
    assert decode(page(text).encode(codec_of(label)), stated, html=True) == (page(text), "guess")


@pytest.mark.parametrize("text", LANGUAGES)
@pytest.mark.parametrize("stated", ["", "text/html; charset=utf-8", "text/html; charset=iso-8859-1"])
def test_utf8_is_utf8_whatever_is_declared(text, stated):
    assert decode(page(text).encode(), stated, html=True) == (page(text), "UTF-8")


@pytest.mark.parametrize("text", LANGUAGES)
@pytest.mark.parametrize("stated", ["", "text/html; charset=utf-8"])
def test_one_bad_byte_in_utf8_costs_that_byte(text, stated):
    data = page(text).encode().replace(b"<body>", b"<body>x\x92s", 1)
    expected = page(text).replace("<body>", "<body>x\ufffds")
    assert decode(data, stated, html=True) == (expected, "UTF-8 with replacements")


@pytest.mark.parametrize(("characters", "way"), [(10, "UTF-8 with replacements"), (9, "HTTP header")])
def test_ten_characters_outweigh_a_bad_byte_and_a_declaration(characters, way):
    data = "é".encode() * characters + b" x\x92s"
    assert decode(data, "text/html; charset=windows-1252")[1] == way


def test_the_mark_of_what_could_not_be_read_is_a_character_where_the_text_has_it():
    assert decode("Stra\ufffde".encode()) == ("Stra\ufffde", "UTF-8")


def test_a_guess_of_a_rare_encoding_is_not_believed():
    assert decode("mañana, señor".encode("cp1252")) == ("mañana, señor", "guess")  # ISO-8859-10 by the library


@pytest.mark.parametrize("text", LANGUAGES)
def test_utf8_that_ends_within_a_character_costs_that_character(text):
    place = max(place for place, letter in enumerate(text) if not letter.isascii())
    cut = text[: place + 1].encode()[:-1]
    assert decode(cut, "text/html; charset=utf-8", html=True) == (text[:place], "UTF-8")


@pytest.mark.parametrize("text", LANGUAGES)
@pytest.mark.parametrize(
    ("mark", "codec"),
    [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_a_byte_order_mark_counts_more_than_any_word(text, mark, codec):
    assert decode(mark + text.encode(codec), "text/html; charset=koi8-r") == (text, "byte order mark")


def test_order_of_what_is_declared():
    russian = TEXTS["ru"][0]
    data = page(russian, "<meta charset=koi8-r>").encode("cp1251")
    assert russian in decode(data, "text/html; charset=windows-1251", html=True)[0]
    assert russian not in decode(data, html=True)[0]
    assert russian not in decode(data)[0] or decode(data)[1] == "guess"  # of no page: its meta elements do not count


@pytest.mark.parametrize(
    "head",
    [
        "<!-- <meta charset=koi8-r> --><meta charset=windows-1251>",
        '<meta name=description content="how to write charset=koi8-r"><meta charset=windows-1251>',
        '<meta http-equiv=refresh content="5; url=/?charset=koi8-r"><meta charset=windows-1251>',
        "<meta charset=utf-16><meta charset=windows-1251>",
        "<meta charset=nonsense><meta charset=windows-1251>",
    ],
)
def test_what_is_no_declaration_is_none(head):
    data = page(TEXTS["ru"][0], head).encode("cp1251")
    assert decode(data, html=True) == (page(TEXTS["ru"][0], head), "meta element")


def test_utf16_by_its_header():
    assert decode(page("Hello").encode("utf-16-le"), "text/html; charset=UTF-16") == (page("Hello"), "HTTP header")


def test_labels_are_those_of_browsers():
    names = {"latin1": "cp1252", "ASCII": "cp1252", " l9 ": "iso8859-15", "GB2312": "gb18030", "sjis": "cp932",
             "euc-kr": "cp949", "big5-hkscs": "big5hkscs", "tis-620": "cp874", "x-user-defined": "cp1252",
             "unicode-1-1-utf-8": "utf-8", "utf-7": None, "": None}  # fmt: skip
    assert {label: codec_of(label) for label in names} == names
    assert all(codecs.lookup(name) for name in names.values() if name)


def test_characters_that_only_the_wider_encodings_have():
    for label, text in {"shift_jis": "①髙", "gb2312": "€镕", "ks_c_5601-1987": "똠", "big5": "嘅"}.items():
        data = text.encode(codec_of(label))
        assert decode(data, f"text/html; charset={label}") == (text, "HTTP header")


def test_a_page_of_a_crawl_is_decoded_by_its_header(tmp_path):
    text = TEXTS["pl"][0]
    found, problems = read(
        tmp_path, archive(page(text).encode("iso-8859-2"), content_type="text/html; charset=iso-8859-2")
    )
    assert [(doc["text"], doc["encoding"]) for doc in found] == [(page(text), "HTTP header")]
    assert problems == []
