"""What holds for every configuration, order of rows and manifest; `--hypothesis-profile=long` tries many more."""

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis.strategies import binary, booleans, dictionaries, floats, integers, lists, one_of, sampled_from, text

from mixtral_jax.config import UserError
from mixtral_jax.config_loading import all_keys, parse_config, to_yaml
from mixtral_jax.data.row_order import choose_sources, place_of_row, rows_dealt, shuffled_rows
from mixtral_jax.runs.manifest import NAME, find_damage, write_manifest
from tests.tiny import TINY

KEYS = sorted(set(all_keys()) - {"init_from"})
SEEDS = integers(0, 2**64 - 1)


@settings(max_examples=max(10, settings().max_examples // 4))
@given(dictionaries(sampled_from(KEYS), one_of(integers(0, 64), integers(), floats(), booleans(), text()), max_size=3))
def test_a_configuration_that_is_taken_is_written_and_read_back(changes):
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    try:
        config = parse_config(TINY, overrides)
    except UserError as error:
        sentence = str(error)
    else:
        assert parse_config(to_yaml(config), saved=True) == config
        return
    assert sentence.isprintable()


@given(integers(1, 5000), integers(0, 2**20), SEEDS, integers(0, 100))
def test_an_epoch_is_a_permutation_and_the_way_back_is_known(size, epoch, seed, source):
    rows = shuffled_rows(np.arange(size) + epoch * size, size, seed, source)
    np.testing.assert_array_equal(np.sort(rows), np.arange(size))
    for place in (0, size // 2, size - 1):
        assert place_of_row(int(rows[place]), epoch, size, seed, source) == place


@given(lists(floats(1e-6, 1e6), min_size=1, max_size=6), integers(0, 2000), integers(0, 10**10))
def test_rows_are_dealt_once_and_counted_right(weights, rows, begin):
    sources, places = choose_sources(np.arange(begin, begin + rows), weights)
    before, after = (np.array(rows_dealt(count, weights)) for count in (begin, begin + rows))
    np.testing.assert_array_equal(after - before, np.bincount(sources, minlength=len(weights)))
    for source, first in enumerate(before):
        np.testing.assert_array_equal(places[sources == source], first + np.arange(after[source] - first))
    shares = np.array(weights) / sum(weights)
    assert np.abs(after - before - shares * rows).max(initial=0) <= len(weights) + rows * len(weights) / (1 << 24)


NAMES = text("ab._-é ☃\n", min_size=1, max_size=8).filter(lambda name: name.strip(".") and name != NAME)


@given(dictionaries(NAMES, binary(max_size=50), min_size=1, max_size=4), integers(0), integers(0, 399))
def test_every_change_below_a_manifest_is_named(files, chosen, bit):
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        write_manifest(folder)
        assert find_damage(folder) is None
        name = sorted(files)[chosen % len(files)]
        content = files[name]
        for other in (content + b"\0", content[:-1] or b"x"):
            (folder / name).write_bytes(other)
            assert name in find_damage(folder)
        if content:
            flipped = bytearray(content)
            flipped[bit // 8 % len(content)] ^= 1 << bit % 8
            (folder / name).write_bytes(flipped)
            assert f"{name} is not what was written" in find_damage(folder)
        (folder / name).rename(folder / "elsewhere")
        assert f"{name!r} is missing" in find_damage(folder)
        (folder / "elsewhere").rename(folder / name)
        (folder / name).write_bytes(content)
        assert find_damage(folder) is None
