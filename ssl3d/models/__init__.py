"""Networks: the shared backbone, spatial transformations, and how to build them by name."""
