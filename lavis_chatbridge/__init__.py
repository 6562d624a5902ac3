"""ChatBridge for LAVIS: one language model that sees images, watches videos and hears sounds (arXiv 2305.16103).

torch calls :func:`activate` at the end of ``import torch`` (entry point ``torch.backends``), and LAVIS imports torch;
importing this package does the same, where torch's plugin autoload is switched off. This file is therefore small,
imports only what is loaded already, and never raises; what can wait for ``import lavis`` is in ``plugin/autoload.py``.
"""

import sys

__version__ = "0.2.0"


class _Door:
    """A finder that asks ``plugin/autoload.py`` about LAVIS's modules and this package's, and knows no others."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if not name.startswith("lavis") or name.startswith("lavis_chatbridge.plugin"):
            return None
        from lavis_chatbridge.plugin import autoload

        return autoload.find_spec(name, path, target)


def activate() -> None:
    """Open the door into LAVIS, once; an exception here would break ``import torch`` for the whole environment."""
    try:
        if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
            sys.meta_path.insert(0, _Door())
        if "lavis" in sys.modules:
            from lavis_chatbridge.plugin import autoload

            autoload.catch_up()
    except Exception as fault:
        import logging

        logging.getLogger(__name__).warning("lavis-chatbridge is not active: %s: %s", type(fault).__name__, fault)


activate()
