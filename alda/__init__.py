"""alda: active learning for domain-adaptive semantic segmentation. Start with ``python -m alda.loop --help``."""

__version__ = "0.1.0"
