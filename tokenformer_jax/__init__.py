"""TokenFormer (arXiv 2410.23168) in JAX: train, grow without loss, train on, evaluate, generate."""
