"""Masks addresses of people and machines: datatrove's formatter with patterns whose time grows as the text does."""

import re

from datatrove.pipeline.formatters import PIIFormatter

ATOM = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
LABEL = r"[A-Za-z0-9]++(?:-++[A-Za-z0-9]++)*+"
OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# A run of characters that may stand before the @ is looked at once, from its begin.
EMAIL = re.compile(rf"(?<![{ATOM}.])[{ATOM}.]++@(?:{LABEL}(?:\.{LABEL})++|\[{OCTET}(?:\.{OCTET}){{3}}\])")
# No part of a longer number, of a name, or of a version such as 1.2.3.4-rc1.
IP = re.compile(rf"(?<![\w.]){OCTET}(?:\.{OCTET}){{3}}(?!\w|\.\d|-[A-Za-z])")
# What stands before the number of a section or a version: a word for it, or the name of a product and a slash.
NUMBERED = re.compile(
    r"(?:\b(?:sections?|sec|chapters?|articles?|clauses?|paragraphs?|appendix|figures?|tables?|rules?|oid|versions?|ver|v|"
    r"releases?|builds?|kernel|firmware|revision|rev|chapitres?|abschnitt|kapitel|artikel|absatz|secci[oó]n|cap[ií]tulo|"
    r"art[ií]culo|versi[oó]n|sezione|capitolo|articolo|versione|punto|punkt)[.:]?|§)\s{0,2}$"
    r"|(?:^|[\s(\"',;])[A-Za-z][\w.+]*[/-]$",
    re.IGNORECASE,
)
BEFORE = 24  # characters before an address that are looked at


class Masking(PIIFormatter):
    """Replaces e-mail addresses and public IP addresses."""

    def __init__(self, emails: bool = True, ips: bool = True):
        """Says which of them."""
        super().__init__(remove_emails=emails, remove_ips=ips)

    def format(self, text: str) -> str:
        """The text with other addresses in it."""
        if self.remove_emails and "@" in text:
            text = EMAIL.sub(self._email, text)
        return IP.sub(self._ip, text) if self.remove_ips else text

    def _email(self, found: re.Match[str]) -> str:
        run = found[0].partition("@")[0]
        local = run.rpartition("..")[2].lstrip(".!#$%&'*+/=?^`{|}~-")
        head = run.removesuffix(local)
        return head + self.emails_replacer.replace("a@b.cd") if local else found[0]

    def _ip(self, found: re.Match[str]) -> str:
        before = found.string[max(0, found.start() - BEFORE) : found.start()]
        return found[0] if NUMBERED.search(before) else self.ip_replacer.replace(found[0])
