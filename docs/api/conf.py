"""Sphinx: the API reference, from the docstrings. ``tox -e docs`` builds it, every warning an error."""

import inspect

import granq_plugin

project = "granq-plugin"
author = "The granq-plugin contributors"
project_copyright = author
version = release = granq_plugin.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"granq-plugin {release}"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
maximum_signature_line_length = 88
# Brevitas's injectors have an answer to every attribute that inspect asks for, but not a signature
for name in filter(lambda name: name.startswith("GranQ"), granq_plugin.__all__):
    type.__setattr__(getattr(granq_plugin, name), "__signature__", inspect.Signature())
