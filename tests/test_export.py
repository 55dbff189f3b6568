"""The book machine on small books in temporary folders."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tinychat.book.__main__ import main
from tinychat.book.chapter import BookError, parse
from tinychat.book.check import check
from tinychat.book.export import export, render
from tinychat.book.where import chapter_of, find_chapter, split_place, where

pytest_plugins = ["pytester"]

ALPHA = '''\
# ---
# jupyter: {}
# ---

# %% [markdown]
# # Alpha
#
# Count to
# three.
#
# More prose.

# %% tags=["export"]
import math

# %%
print("not exported")

# %% tags=["export"]
LIMIT = 3


def count() -> list[int]:
    # A comment that stays.
    text = """
    # %%not a marker
    """

    return [math.floor(n) for n in range(LIMIT)] if text else []


# %% tags=["test"]
assert count() == [0, 1, 2]
'''

BETA = """\
# %% [markdown]
# # Beta
#
# Build on alpha.

# %% tags=["export"]
from tinychat.alpha import count

# %% tags=["export"]
def twice() -> list[int]:
    return count() * 2
"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Two chapters and their modules, all in order."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "tinychat").mkdir()
    (tmp_path / "tinychat" / "__init__.py").write_text("")
    write(tmp_path, "01_alpha.py", ALPHA)
    write(tmp_path, "02_beta.py", BETA)
    export(tmp_path)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / "chapters" / name).write_text(text, encoding="utf-8")


def test_module_is_header_and_exported_cells_verbatim(book):
    expected = '''\
"""Count to three.

Generated from chapters/01_alpha.py: edit that file,
then run `python -m tinychat.book export`.
"""

import math


LIMIT = 3


def count() -> list[int]:
    # A comment that stays.
    text = """
    # %%not a marker
    """

    return [math.floor(n) for n in range(LIMIT)] if text else []
'''
    assert (book / "tinychat" / "alpha.py").read_text() == expected
    assert check(book) == []


def test_export_writes_only_what_changed(book):
    assert export(book) == ([], [])
    write(book, "02_beta.py", BETA.replace("* 2", "* 3"))
    assert export(book) == (["wrote tinychat/beta.py"], [])
    assert not list((book / "tinychat").glob("*.tmp"))


def test_summary_may_hold_quotes_and_backslashes():
    chapter = parse('# %% [markdown]\n# # T\n#\n# A """quoted""" \\n line"\n', "03_t.py")
    text = render(chapter).text
    assert ast.get_docstring(ast.parse(text)).startswith("A '''quoted''' \\n line\"")


def test_chapter_without_exports_makes_no_module(book):
    write(book, "00_tour.py", "# %% [markdown]\n# # Tour\n\n# %%\nprint(1)\n")
    assert export(book) == ([], [])
    assert check(book) == []
    assert not (book / "tinychat" / "tour.py").exists()


def test_drift_is_found_in_memory(book):
    path = book / "tinychat" / "alpha.py"
    path.write_text(path.read_text().replace("LIMIT = 3", "LIMIT = 4"))
    before = path.read_text()
    (problem,) = check(book)
    assert "tinychat/alpha.py:10 differs from chapters/01_alpha.py:20" in problem
    assert path.read_text() == before


def test_drift_at_the_end_is_found(book):
    path = book / "tinychat" / "beta.py"
    path.write_text(path.read_text() + "extra = 1\n")
    assert "beta.py" in check(book)[0]


def test_crlf_checkout_is_no_drift(book):
    path = book / "tinychat" / "alpha.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(book) == []


def test_missing_module(book):
    (book / "tinychat" / "beta.py").unlink()
    (problem,) = check(book)
    assert problem.startswith("tinychat/beta.py is missing")


def test_orphans_generated_ones_are_removed_others_never(book):
    (book / "tinychat" / "mine.py").write_text("x = 1\n")
    (book / "chapters" / "02_beta.py").unlink()
    assert [problem.split()[0] for problem in check(book)] == [
        "tinychat/beta.py",
        "tinychat/mine.py",
    ]
    done, problems = export(book)
    assert problems == [] and done == ["removed tinychat/beta.py: no chapter exports it any more"]
    assert (book / "tinychat" / "mine.py").exists()


def test_duplicate_names(book):
    again = '\n\n# %% tags=["export"]\ndef twice() -> int:\n    return 2\n'
    write(book, "02_beta.py", BETA + again)
    assert any("'twice' is exported at line 10 too" in problem for problem in check(book))
    write(book, "02_beta.py", BETA + "\n\n# %%\ndef twice():\n    return 2\n")
    assert any("exported name of line 10" in problem for problem in check(book))


def test_two_chapters_of_one_number_or_name(book):
    write(book, "02_gamma.py", BETA.replace("Beta", "Gamma"))
    write(book, "03_alpha.py", "# %% [markdown]\n# # Alpha again\n")
    problems = " ".join(check(book))
    assert "has the number 02 too" in problems and "has the name 'alpha' too" in problems


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import tinychat.gamma", "earlier ones only"),
        ("from tinychat import gamma", "earlier ones only"),
        ("from tinychat.beta import twice as again", "never imports its own module"),
        ("from tinychat.cli.app import main", "not tinychat.cli.app"),
        ("from tinychat.book import where", "not tinychat.book"),
        ("from . import alpha", "imports are absolute"),
        ("import tinychat", "name the module"),
        ('__import__("tinychat.gamma")', "earlier ones only"),
        ("import importlib; importlib.import_module('tinychat.beta')", "own module"),
        ("if True:\n    def inner():\n        import tinychat.gamma", "earlier ones only"),
    ],
)
def test_import_law(book, line, reason):
    write(book, "03_gamma.py", BETA.replace("twice", "thrice").replace("Beta", "Gamma"))
    write(book, "02_beta.py", f"{BETA}\n\n# %%\n{line}\n")
    export(book)
    (problem,) = check(book)
    assert reason in problem and problem.startswith("chapters/02_beta.py:1")


def test_import_law_allows_data_runtime_libraries_and_earlier_chapters(book):
    cell = (
        "from tinychat import __version__, data\nfrom tinychat.runtime.errors import ConfigError\n"
        "import torch.nn.functional as F\nfrom tinychat.alpha import LIMIT\n"
    )
    write(book, "02_beta.py", f"{BETA}\n\n# %%\n{cell}")
    assert check(book) == []


def test_a_chapter_that_exports_nothing_may_use_every_module(book):
    tour = "# %% [markdown]\n# # Tour\n#\n# Look.\n\n# %%\n"
    write(book, "00_tour.py", f"{tour}from tinychat.beta import twice\n")
    assert check(book) == []
    write(book, "00_tour.py", f"{tour}from tinychat.cli.app import main\n")
    (problem,) = check(book)
    assert "not tinychat.cli.app" in problem


def test_pictures_are_for_the_chapter_not_for_its_module(book):
    line = "from tinychat.book.picture import picture"
    write(book, "02_beta.py", f"{BETA}\n\n# %%\n{line}\n")
    assert check(book) == []
    write(book, "02_beta.py", BETA.replace('tags=["export"]\n', f'tags=["export"]\n{line}\n', 1))
    export(book)
    (problem,) = check(book)
    assert "not tinychat.book.picture" in problem


def test_only_the_first_exported_cell_imports(book):
    late = '\n\n# %% tags=["export"]\ndef late():\n    import json\n    return json\n'
    write(book, "02_beta.py", BETA + late)
    export(book)
    (problem,) = check(book)
    assert problem == (
        "chapters/02_beta.py:16: the first exported cell holds all imports; move this one there"
    )


def test_every_exported_line_maps_to_its_own_text(book):
    for chapter_name in ("01_alpha.py", "02_beta.py"):
        chapter = parse((book / "chapters" / chapter_name).read_text(), chapter_name)
        module = render(chapter)
        lines = module.text.splitlines()
        source = (book / chapter.path).read_text().splitlines()
        assert len(module.origin) == len(lines)
        first = lines.index('"""', 1) + 2
        for number, line in enumerate(lines[first:], first + 1):
            if line:
                assert source[module.where(number) - 1] == line


def test_where(book):
    assert where(book, "tinychat/alpha.py:10") == "chapters/01_alpha.py:20"
    assert where(book, f"{book}/tinychat/alpha.py:10") == "chapters/01_alpha.py:20"
    assert where(book, r"C:\work\tinychat\alpha.py:10") == "chapters/01_alpha.py:20"
    assert where(book, "tinychat/alpha.py") == "chapters/01_alpha.py:6"
    assert split_place(r"C:\tinychat\alpha.py") == (r"C:\tinychat\alpha.py", 1)
    with pytest.raises(BookError, match="there is no line 999"):
        where(book, "tinychat/alpha.py:999")
    with pytest.raises(BookError, match="edit it where it is"):
        where(book, "tinychat/data/alpha.py:1")
    with pytest.raises(BookError, match="edit it where it is"):
        chapter_of(book, "tinychat/__init__.py")


@pytest.mark.parametrize("name", ["2", "02", "beta", "02_beta", "chapters/02_beta.py"])
def test_find_chapter(book, name):
    assert find_chapter(book, name).name == "02_beta.py"


def test_unreadable_chapters_are_named_and_their_modules_kept(book):
    before = (book / "tinychat" / "beta.py").read_text()
    write(book, "02_beta.py", BETA.replace("return", "retur n"))
    done, (problem,) = export(book)
    assert done == [] and problem.startswith("chapters/02_beta.py:11:")
    write(book, "02_beta.py", BETA.replace('["export"]', "[export]"))
    assert "can't read the tags" in export(book)[1][0]
    write(book, "02_beta.py", BETA.replace("# # Beta", "# Beta"))
    assert "needs a title line" in export(book)[1][0]
    (book / "chapters" / "02_beta.py").write_bytes(b"\xff\xfe")
    assert "not UTF-8 at byte 0" in export(book)[1][0]
    write(book, "02_Beta.py", BETA)
    assert any("named like" in problem for problem in export(book)[1])
    assert (book / "tinychat" / "beta.py").read_text() == before


def test_command_line(book, capfd):
    root = ["--root", str(book)]
    assert main([*root, "check"]) == 0
    assert main([*root, "export"]) == 0
    assert main([*root, "where", "tinychat/alpha.py:10"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "chapters/01_alpha.py:20"
    assert main([*root, "where", "README.md"]) == 2
    assert main([*root, "run", "9"]) == 2
    assert "there are: 01_alpha, 02_beta" in capfd.readouterr().err
    (book / "tinychat" / "beta.py").unlink()
    assert main([*root, "check"]) == 1
    assert main([*root, "run", "1"]) == 0
    assert "not exported" in capfd.readouterr().out


def test_the_machine_imports_the_standard_library_only():
    code = (
        "import sys, tinychat.book.__main__; "
        "print(sorted(set(m.partition('.')[0] for m in sys.modules) - sys.stdlib_module_names))"
    )
    command = [sys.executable, "-S", "-c", code]
    root = Path(__file__).resolve().parents[1]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(answer.stdout)) <= {"tinychat", "__main__"}


def test_a_failing_test_says_where_to_edit(book, pytester):
    write(book, "01_alpha.py", ALPHA.replace("range(LIMIT)", "range(LIMIT // 0)"))
    export(book)
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    conftest = conftest.replace("Path(__file__).resolve().parents[1]", f"Path({str(book)!r})")
    pytester.makeconftest(conftest)
    pytester.makepyfile(
        f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("alpha", {str(book / "tinychat/alpha.py")!r})
        alpha = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alpha)

        def test_count():
            print("noise")
            alpha.count()

        def test_own():
            assert 0
        """
    )
    lines = pytester.runpytest_inprocess("-p", "no:cacheprovider").stdout.lines
    assert lines.count("edit here: chapters/01_alpha.py:29") == 1
    assert lines.index("edit here: chapters/01_alpha.py:29") > lines.index("noise")
    assert sum(line.startswith("edit here") for line in lines) == 1
