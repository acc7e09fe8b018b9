"""The network files of a bundle, checked before a session opens them.

A manifest's hashes show that files belong together, not who wrote them: a network may have a loop without an end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mezzotint.runtime.errors import BundleError

if TYPE_CHECKING:
    from mezzotint.runtime.bundle.bundle import Bundle


def with_checked_networks(bundle: Bundle) -> Bundle:
    """Return the bundle. Raise BundleError for a network that is no valid model or passes a limit."""
    from mezzotint.compiler.errors import ModelError
    from mezzotint.compiler.graph.model_file import check_model_file

    names = bundle.precisions.files.values() if bundle.precisions else ()
    for path in [bundle.path / name for name in names] or [bundle.model_path]:
        try:
            check_model_file(path)
        except ModelError as error:
            raise BundleError(f"the bundle's network: {error.what}", where=error.where, hint=error.hint) from error
    return bundle
