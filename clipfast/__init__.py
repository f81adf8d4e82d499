"""clipfast: a CLIP engine."""
