import bench.rivals  # noqa: F401 - makes open_clip and transformers importable beside a CPU torch, from this folder
