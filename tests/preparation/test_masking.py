"""Addresses are masked, numbers that look like some are not, and no text takes a time out of step with its length."""

import random
import re
import signal
import string

import pytest

from mixtral_jax.preparation.masking import Masking

EMAIL = r"(email@example\.com|firstname\.lastname@example\.org)"
ADDRESS = r"(22\.214\.171\.124|126\.96\.36\.199)"

MASKED = {
    "a@b.com": EMAIL,
    "Write to...john.doe@x.co.uk. Next": rf"Write to\.\.\.{EMAIL}\. Next",
    "'jim@x.org', <mailto:o'neil+x@mail.x-y.org>": rf"'{EMAIL}', <mailto:{EMAIL}>",
    "jörg_m@x.org?": rf"jö{EMAIL}\?",
    "x@[8.8.4.4] x@8.8.4.4": rf"{EMAIL} {EMAIL}",
    "a@b.com,c@d.org": rf"{EMAIL},{EMAIL}",
    "x" * 99 + "@y.com": EMAIL,
    "at 8.8.4.4, (1.0.0.1) http://9.9.9.9/x 4.2.2.2:80": rf"at {ADDRESS}, \({ADDRESS}\) http://\d[\d.]+/x \d[\d.]+:80",
    "It is 8.8.4.4. Then": rf"It is {ADDRESS}\. Then",
    "8.8.8.0/24": rf"{ADDRESS}/24",
}
LEFT = [
    "j@localhost, @home, a@, 5 @ 3.20, x..@y.com, @y.com, a@-b.com",
    "section 3.2.1.4 of, Section  3.2.1.4, §3.2.1.4, sec. 3.2.1.4, Abschnitt 3.2.1.4, capítulo 3.2.1.4",
    "OID 1.3.6.1.4.1.311 and 1.3.6.1.4 and OID: 1.3.6.1",
    "1999.11.12.13 and 12.13.11.1999 and 01.02.03.04 and 300.1.1.1",
    "v1.2.3.4, version 1.2.3.4, 1.2.3.4-rc1, 1.2.3.4b, kernel 2.6.32.5, Mozilla/5.0.3.1, openssl-1.0.2.3, 8.8.8.8.9",
    "192.168.0.1 127.0.0.1 10.1.2.3",
]


@pytest.mark.parametrize("text", MASKED)
def test_addresses_are_masked(text):
    masked = Masking().format(text)
    assert re.fullmatch(MASKED[text], masked)
    for number in re.findall(r"\b(?:8\.8|1\.0|9\.9|4\.2)[\d.]+", text):
        assert number not in masked


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_like_an_address_is_left(text):
    assert Masking().format(text) == text


def test_each_kind_can_be_left_alone():
    text = "a@b.com 8.8.4.4"
    assert Masking(emails=False).format(text) == "a@b.com 22.214.171.124"
    assert Masking(ips=False).format(text) == "email@example.com 8.8.4.4"
    assert Masking(emails=False, ips=False).format(text) == text


def noise() -> str:
    draw = random.Random(0)
    return "".join(draw.choices(string.ascii_letters + string.digits + "+/", k=400_000))


HARD = {"base64": noise(), "numbers": "1." * 200_000, "names": "a." * 200_000, "domain": "a@" + "b." * 200_000,
        "hyphens": "a@" + "b-" * 200_000, "signs": "a@" * 200_000, "dots": "." * 400_000, "letters": "a" * 400_000,
        "spaces": "section" + " " * 400_000 + "1.2.3.4", "apart": "a@b." * 100_000}  # fmt: skip


@pytest.mark.parametrize("text", HARD.values(), ids=list(HARD))
def test_hard_text_takes_no_longer_than_other_text(text):
    """Of the processor's time, as the system counts it: what goes back and forth would need minutes or hours."""

    def too_long(*_):
        raise AssertionError("more than 5 seconds for 400 kB")

    before = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, 5)
    try:
        Masking().format(text)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
