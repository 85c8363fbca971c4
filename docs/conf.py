"""Builds the documentation: `pip install -r docs/requirements.txt && sphinx-build -W docs docs/_build`.

`DOCS_EXECUTE=1` runs the notebooks, so that they appear with their pictures; without it they appear as they are stored.
"""

import inspect
import os
import pathlib
import re
import shutil
import sys
import typing
from itertools import zip_longest

DOCS = pathlib.Path(__file__).resolve().parent
EXECUTE = bool(os.environ.get("DOCS_EXECUTE"))
LINKED = ("run.py", "configs", "squeeze_jax")  # what notebooks need of the repository
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import squeeze_jax  # noqa: E402

project = "squeeze_jax"
author = "the authors of squeeze_jax"
version = release = squeeze_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = [
    "_build",
    "_generated",
    *(f"_notebooks/{name}" for name in LINKED),
    "_notebooks/runs",
    "jupyter_execute",
    "requirements.txt",
    "results",
]

html_theme = "sphinx_book_theme"
html_title = "squeeze_jax"
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has a search already
}
html_static_path = ["_static"]
html_css_files = ["style.css"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force" if EXECUTE else "off"
nb_execution_timeout = 3600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"  # notebooks show tables

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_google_docstring = True

# Docstrings are written for people who read them in a terminal or an editor.
default_role = "literal"


def as_rst(app, what, name, obj, options, lines):
    """Turns a docstring, which is written like Markdown, into reStructuredText, before napoleon reads its sections."""
    section, literal, made = False, False, []
    for line in one_name_each(lines):
        indented = line.startswith("  ")
        if re.fullmatch(r"\w+:", line):
            section = line[:-1] in ("Args", "Attributes", "Returns", "Raises", "Yields")
        elif line.strip() and not indented:
            section = False
        if section:
            literal = False
        elif indented and not literal:  # a drawing or a table
            made += [*([""] if made and made[-1].strip() else []), "::", ""]
            literal = True
        elif literal and line.strip() and not indented:
            made += [""]
            literal = False
        made.append(line if literal else escaped(line, section))
    lines[:] = made


def one_name_each(lines):
    """Returns the lines with `a, b: text` in a section of names written as `a: text` and `b: text`, as napoleon reads it."""
    written, entry, names = [], [], []

    def finish():
        for name in names:
            written.extend([f"  {name}: {entry[0]}", *entry[1:]])
        names.clear()

    section = False
    for line in lines:
        head = re.match(r"  (\w+(?:, \w+)+): ", line) if section else None
        if names and not head and line.startswith("    "):
            entry.append(line)
            continue
        finish()
        if line.strip() and not line.startswith("  "):
            section = line in ("Args:", "Attributes:")
        if head:
            names, entry = head[1].split(", "), [line[len(head[0]) :]]
        else:
            written.append(line)
    finish()
    return written


def without_ranges(app, obj, bound_method):
    """Removes the ranges of values from a function's annotations, which the descriptions of its arguments state."""
    function = inspect.unwrap(obj)
    if inspect.isfunction(function):
        function.__annotations__ = typing.get_type_hints(function)


def shortened_signature(app, what, name, obj, options, signature, returns):
    """Returns a signature without Flax's own arguments of modules, and without the addresses of default values."""
    if signature is None:
        return None
    signature = re.sub(
        r", parent(: [^=]*)?=<[^>]*>, name(: [^=]*)?=None\)", ")", signature
    )
    return re.sub(r"<function [^<>]*(?:<locals>)?[^<>]*>", "...", signature), returns


def escaped(line, section):
    """Returns a line with code in double backquotes, and without characters that reStructuredText would interpret."""
    begin = re.match(r"\s*\*{0,2}\w+(, \*{0,2}\w+)*: ", line) if section else None
    head = begin[0] if begin else ""  # names of parameters, which napoleon reads
    if "," in head:
        head = head.replace("*", "\\*")
    rest = line[len(begin[0]) :] if begin else line
    parts = re.split(r"(`[^`]+`)", rest)
    plain = (re.sub(r"([*|`]|_\b)", r"\\\1", p) for p in parts[::2])
    code = (f"`{p}`\\ " for p in parts[1::2])  # a letter may follow
    return head + "".join(
        part for pair in zip_longest(plain, code, fillvalue="") for part in pair
    )


def prepare(app):
    """Copies the notebooks into the sources and generates the tables.

    A notebook finds the repository by `run.py`, and trains in `runs` beside it. With a link to `run.py` beside the copies, that is
    `docs/_notebooks/runs`, and a build never continues a run of the user or of an earlier build.
    """
    import tables

    target = DOCS / "_notebooks"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(DOCS.parent / "notebooks", target)
    if EXECUTE:
        for name in LINKED:
            (target / name).symlink_to(DOCS.parent / name)
    tables.write(DOCS / "_generated")


def setup(app):
    app.connect("builder-inited", prepare)
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("autodoc-before-process-signature", without_ranges)
    app.connect("autodoc-process-signature", shortened_signature)
