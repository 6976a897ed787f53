"""MemGen: generative latent memory for language models (arXiv:2509.24704). Start reading in `memgen.types`."""

__version__ = "0.1.0"
