"""ChatBridge for LAVIS: one language model that sees images, watches videos and hears sounds (arXiv 2305.16103).

Importing this package makes LAVIS know ChatBridge, also where torch's plugin autoload is switched off. It imports nothing
but the standard library: it runs inside ``import torch``.
"""

__version__ = "0.1.0"
