"""The verb's sentences, and plans of real programs where the compilers are installed."""

import importlib.util
import re

import pytest

from docs.record_plans import CONFIGS, PLANS, TOPOLOGIES, record
from docs.record_plans import main as record_main
from mixtral_jax.config import UserError
from mixtral_jax.planning import topology
from mixtral_jax.planning.command import main
from mixtral_jax.planning.compile import DoesNotFitError, _explained

CONFIG = str(CONFIGS / "8x7b_v5p_128.yaml")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([CONFIG, "--topology", "v9:4x4"], "'v9:4x4' is no topology: known are v4, v5p with three sides"),
        ([CONFIG, "--topology", "v5p:4x4"], "'v5p:4x4' is no topology"),
        ([CONFIG, "--topology", "h100"], "'h100' is no topology"),
        ([CONFIG, "--topology", "h100:8x8", "--slices", "2"], "--slices is for TPU: say h100:16x8"),
        ([CONFIG, "--topology", "v5p:4x4x4", "--write", "x.yaml"], "--write and --batch-sizes belong to --search"),
        ([CONFIG, "--topology", "v5p:4x4x4", "--search", "--write", CONFIG], "exists: name another file"),
        ([CONFIG, "--topology", "v5p:4x4x4", "--search", "--write", "no/x.yaml"],
         "cannot write no/x.yaml: there is no such directory; give another file to --write"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        main(arguments)


@pytest.mark.parametrize(("name", "package"), [("v5p:4x4x4", "libtpu"), ("h100:8x8", "jax_cuda13_plugin")])
def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch, name, package):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'mixtral_jax\[plan\]'"):
        main([CONFIG, "--topology", name])


@pytest.mark.parametrize(
    "words",
    [
        "Ran out of memory in memory space hbm. Used 52.00G of 31.25G hbm. Exceeded hbm capacity by 20.75G.",
        "Out of HBM, the total memory required for HLO temporaries (52.00G) exceeds available HBM (31.25G).",
    ],
)
def test_the_compiler_s_refusal_becomes_figures(words):
    refusal = _explained(Exception(f"RESOURCE_EXHAUSTED: {words}"))
    assert isinstance(refusal, DoesNotFitError)
    assert (refusal.needed, refusal.given) == (52 * 2**30, 31.25 * 2**30)
    assert str(refusal) == "does not fit: the compiler needs 52.0 GiB of 31.2 GiB a chip"


def test_other_refusals_are_told_in_a_line():
    assert str(_explained(Exception("INTERNAL: broken\nstack"))) == "the compiler refuses: INTERNAL: broken"


def test_unknown_pod_configs_are_named():
    with pytest.raises(UserError, match="no pod config is called 8x8b: choose from 8x7b_v5p_128"):
        record_main(["8x8b"])


def compilers(name):
    reason = f"{name} is not installed (requirements-plan.txt)"
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=reason)


def recorded(name):
    """A shipped config: one is compared whenever the compilers are there, all where they are asked for."""
    marks = [pytest.mark.slow, compilers("jax_cuda13_plugin" if "00_" in name else "libtpu")]
    return pytest.param(name, marks=marks if name == "8x7b_h100_64" else [*marks, pytest.mark.plans])


@pytest.mark.parametrize("name", [recorded(name) for name in TOPOLOGIES])
def test_a_recorded_plan_is_what_the_compiler_says_today(name):
    recorded, today = (PLANS / f"{name}.txt").read_text(), record(name)[0]
    figures = re.compile(r"[\d,]+\.\d+")

    def numbers(text):
        return [float(x.replace(",", "")) for x in figures.findall(text)]

    assert figures.sub("#", recorded).split() == figures.sub("#", today).split()
    # Bytes, collectives and FLOPs: a change that makes one of them worse is seen here, one that makes it better is
    # recorded. Schedules differ a little from one run of the compiler to the next.
    assert numbers(today) == pytest.approx(numbers(recorded), rel=0.02, abs=0.011)
