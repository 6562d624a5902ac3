"""ChatBridge for LAVIS: one language model that sees images, watches videos and hears sounds (arXiv 2305.16103).

torch calls :func:`activate` at the end of ``import torch`` (entry point ``torch.backends``), and LAVIS imports torch.
If torch's plugin autoload is switched off, importing this package activates it. Since this file runs at every ``import
torch``, it is small, imports no further modules, and never raises; the rest is in ``plugin/autoload.py``.
"""

import sys

__version__ = "0.2.0"


class _ImportFinder:
    """An import finder that passes LAVIS's modules and this package's to ``plugin/autoload.py``, and ignores others."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        # The package itself and its plugin folder are what the next line imports.
        if not name.startswith(("lavis.", "lavis_chatbridge.")) or name.startswith("lavis_chatbridge.plugin"):
            return None
        from lavis_chatbridge.plugin import autoload

        return autoload.find_spec(name, path, target)


def activate() -> None:
    """Install the import finder, once. Must not raise: that would break ``import torch`` in the whole environment."""
    try:
        if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, _ImportFinder())
    except Exception as fault:
        import logging

        logging.getLogger(__name__).warning("lavis-chatbridge is not active: %s: %s", type(fault).__name__, fault)


activate()
