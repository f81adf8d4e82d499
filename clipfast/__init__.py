"""clipfast: a CLIP engine. ``import clipfast as clip`` takes the place of OpenAI's package."""
