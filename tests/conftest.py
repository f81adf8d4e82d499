import bench.rivals  # noqa: F401 - declares what torchvision lacks beside a CPU torch, before anything imports it
