"""ChatBridge for LAVIS: one language model that sees images, watches videos and hears sounds (arXiv 2305.16103).

Importing this package makes LAVIS know ChatBridge, also where torch's plugin autoload is switched off. It imports
nothing but the standard library: it runs inside ``import torch``.
"""

__version__ = "0.1.0"


def _activate() -> None:
    """Open the plugin's door; a fault there must not break ``import torch``, of which this may be a part."""
    try:
        from lavis_chatbridge.plugin import autoload

        autoload.activate()
    except Exception as fault:
        import logging

        logging.getLogger(__name__).warning("lavis-chatbridge is not active: %s: %s", type(fault).__name__, fault)


_activate()
