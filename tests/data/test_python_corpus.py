"""The builtin corpus on a small standard library of our own."""

import ast
import sysconfig

import pytest

from mixtral_jax.config import UserError
from mixtral_jax.data.python_corpus import python_documents

MODULE = '''# A module.
"""About the module.

More."""
x = "no docstring"


class A(Exception):
    """Größe of A."""

    def f(self):
        """One."""
        return 1

    def g(self): "shares its line"


async def h():
    """
    Two.
    """
    """not a docstring"""
    return 2
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    paths = sysconfig.get_paths() | {"stdlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    return tmp_path


def test_the_real_one_is_large_and_never_says_a_thing_twice():
    found = list(python_documents(lambda count: None))
    assert sum(map(len, found)) > 5_000_000
    prose = "Object for wrapping/filling text.  The public interface consists of"
    assert sum(document.count(prose) for document in found) == 1  # from textwrap's docstring
    assert sum("def dedent(text):" in document for document in found) == 1


def documents():
    return list(python_documents(lambda count: None))


def test_docstrings_and_code_are_parted(library):
    (library / "pack").mkdir()
    (library / "pack" / "__init__.py").write_text(MODULE)
    prose, code = documents()
    assert prose == (
        "pack\n\nAbout the module.\n\nMore.\n\npack.A\n\nGröße of A.\n\npack.A.f\n\nOne.\n\n"
        "pack.A.g\n\nshares its line\n\npack.h\n\nTwo.\n"
    )
    for kept in ("# A module.", 'x = "no docstring"', "        return 1\n", '"shares its line"', "not a docstring"):
        assert kept in code
    for gone in ("About the module", "Größe", "One.", "Two."):
        assert gone not in code
    ast.parse(code)


def test_a_body_of_docstring_alone_stays_valid_code(library):
    (library / "m.py").write_text('class A:\n    """Doc."""\n\nclass B:\n    pass\n')
    assert documents()[1] == "class A:\n    pass\n\nclass B:\n    pass\n"


def test_topics_come_first_and_paragraphs_once(library):
    (library / "pydoc_data").mkdir()
    topics = {"if": "Shared part.\n\nShort.", "compound": "Long  introduction.\n\nShared\npart."}
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}")
    (library / "m.py").write_text("x = 1")
    assert documents() == ["Long  introduction.\n\nShared\npart.\n", "Short.\n", "", "x = 1"]


def test_tests_packages_and_what_is_no_python_are_left_out(library):
    for name in ("test/a.py", "site-packages/b.py", "pkg/tests/c.py"):
        (library / name).parent.mkdir(parents=True)
        (library / name).write_text("secret = 1")
    (library / "old.py").write_text("print 'secret'")
    (library / "binary.py").write_bytes(b"\xff\xfe")
    (library / "good.py").write_text("y = 1")
    assert documents() == ["", "y = 1"]


def test_a_stripped_installation_is_said(library):
    with pytest.raises(UserError, match=r"has no source files: give data\.sources a path instead"):
        documents()
