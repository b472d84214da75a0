"""How Sphinx makes the site: ``python -m sphinx -W -b html docs docs/_build``; ``-b linkcheck`` tries its addresses.

Pages are Markdown, so that they read the same on the site and in the repository. The API comes from docstrings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_lora.version import __version__

project = "lightning-lora"
author = "the authors of lightning-lora"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False

myst_heading_anchors = 3  # [a heading](page.md#a-heading), as on code hosts

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_workers = 2  # hosts of papers slow down who asks faster
linkcheck_anchors = False  # pages that scripts put together have none in their text
linkcheck_report_timeouts_as_broken = True
