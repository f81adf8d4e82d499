"""Other libraries' models, accelerated in place."""

from clipfast.interop.accelerate import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
