"""A small CLIP learns from real image-text pairs in minutes: seven vendors' emoji with their names, tried on an eighth's."""
