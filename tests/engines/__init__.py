"""Real container engines for tests: engines, images, registries and Podman, each made for a test and gone after it."""
