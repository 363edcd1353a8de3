"""Sphinx configuration of the documentation: ``make docs``."""

from importlib.metadata import version as _version

project = "latentize"
author = "The latentize contributors"
version = release = _version("latentize")
extensions = ["myst_parser"]
exclude_patterns = ["*.py"]
html_theme = "furo"
html_title = f"latentize {release}"
# Headings are link targets, as on GitHub.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# Files of the repository that pages link to are not part of the site.
suppress_warnings = ["myst.header"]
