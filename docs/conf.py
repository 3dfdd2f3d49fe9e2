"""How Sphinx builds the documentation: `make docs`."""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import fastelbo

project = "fastelbo"
author = copyright = "The fastelbo developers"
release = version = fastelbo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"light_css_variables": {"code-font-size": "var(--font-size--small--3)"}}
html_title = f"fastelbo {release}"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say which shapes, dtypes and units
napoleon_custom_sections = ["Source"]
napoleon_use_ivar = True
napoleon_use_rtype = False

nitpicky = True
nitpick_ignore_regex = [("py:.*", "(?!fastelbo).*")]  # other projects' names: a build fetches no inventory of theirs


def write_math(writer, node):
    """A formula as MathML, which browsers draw without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def link_pages(app, what, name, thing, options, lines):
    """Docstrings name pages by their files."""
    lines[:] = [re.sub(r"docs/(\w+)\.md", r":doc:`/\1`", line) for line in lines]


def setup(app):
    """Registers both with Sphinx."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-docstring", link_pages)
