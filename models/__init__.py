"""The video LLMs that jaxgrpo trains."""
