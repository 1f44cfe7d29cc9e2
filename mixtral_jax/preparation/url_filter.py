"""Drops pages by their address: datatrove's URL filter without its downloads and its writes to the user's home."""

import os
import tarfile
from functools import lru_cache

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.filters import URLFilter
from datatrove.pipeline.filters.url_filter import get_list, parse_list
from datatrove.utils._import_utils import ASSETS_PATH
from tldextract import TLDExtract

from mixtral_jax.preparation.config import UrlFilterConfig
from mixtral_jax.preparation.examples import Examples


class HashedNames:
    """A set of strings as sorted 64-bit hashes: a fifteenth of the memory of Python's own."""

    def __init__(self, names: list[bytes]):
        """Takes the members."""
        self._hashes = np.sort(np.fromiter(map(xxhash.xxh64_intdigest, names), np.uint64, len(names)))

    def __contains__(self, name: str) -> bool:
        wanted = np.uint64(xxhash.xxh64_intdigest(name))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)


@lru_cache
def _bundled() -> dict[str, HashedNames]:
    """The lists `domains` and `urls` that come with datatrove, once a process."""
    with tarfile.open(os.path.join(ASSETS_PATH, "url_filterblacklistsv0_3_0.tar.gz")) as archive:
        contents = {name: archive.extractfile(name) for name in ("domains", "urls")}
        return {name: HashedNames(file.read().split(b"\n")) for name, file in contents.items() if file}


class AddressFilter(URLFilter):
    """Drops pages on blocked domains and with blocked words in the address; documents without address pass."""

    name = "url_filter"

    def __init__(self, config: UrlFilterConfig, out: Examples):
        """Takes the lists to use."""
        super().__init__(
            soft_word_threshold=config.max_soft_words + 1,
            banned_words=config.words or None,
            use_integrated_lists=config.bundled_lists,
            exclusion_writer=out,
        )
        self._loaded = False
        self._words = config.words
        self._own_domains = frozenset(config.domains)
        # The suffixes that come with tldextract: no download, no cache in the user's home.
        self.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def download_data(self) -> None:
        """Reads the lists where they lie."""
        if self._loaded or not self.use_integrated_lists:
            return
        self._loaded = True
        self.block_listed_domains = _bundled()["domains"]
        self.block_listed_url = _bundled()["urls"]
        self.banned_words = get_list(ASSETS_PATH, "banned_words.txt", parse_list(self._words))
        self.soft_banned_words = get_list(ASSETS_PATH, "soft_banned_words.txt", set())
        with open(os.path.join(ASSETS_PATH, "banned_subwords.txt")) as lines:
            self.banned_subwords = parse_list(lines)
        for word in sorted(self.banned_subwords):
            self.banned_subwords_automaton.add_word(word, len(self.banned_subwords_automaton))
        self.banned_subwords_automaton.make_automaton()

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Whether to keep a document, and why not."""
        url = document.metadata["url"]
        if not url or document.metadata["curated"]:
            return True
        address = self.tldextractor(url)
        if address.top_domain_under_public_suffix in self._own_domains or address.fqdn in self._own_domains:
            return False, "own_domain"
        return super().filter(document)
