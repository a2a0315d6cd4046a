"""What `jaxgrpo verify` compares, one file a subject; `original` alone imports torch."""
