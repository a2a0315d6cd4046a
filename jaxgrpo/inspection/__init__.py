"""The parts of `jaxgrpo inspect`; `main` calls them."""
