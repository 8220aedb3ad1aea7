"""Sphinx: the API reference, from the docstrings. ``tox -e docs`` builds it, every warning an error."""

import importlib
import inspect

from sphinx.util import logging

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
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
maximum_signature_line_length = 88
# Brevitas's injectors have an answer to every attribute that inspect asks for, but not a signature
for name in filter(lambda name: name.startswith("GranQ"), granq_plugin.__all__):
    type.__setattr__(getattr(granq_plugin, name), "__signature__", inspect.Signature())


def warn_of_missing_names(app, env) -> None:
    """Every public name is in the reference: names are imported on first use, and a tool may overlook them."""
    for package in ("granq_plugin", "granq_plugin.zero_shot", "granq_plugin.deploy", "granq_plugin.export",
                    "granq_plugin.functional", "zoo"):
        for name in importlib.import_module(package).__all__:
            if f"{package}.{name}" not in env.get_domain("py").objects and not name.startswith("__"):
                logging.getLogger(__name__).warning("%s.%s is public and not in the reference", package, name)


def setup(app) -> None:
    app.connect("env-check-consistency", warn_of_missing_names)
