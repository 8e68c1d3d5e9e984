"""mMACE: an equivariant message-passing potential E(r, m) with atomic magnetic moments."""

__version__ = "0.1.0"
