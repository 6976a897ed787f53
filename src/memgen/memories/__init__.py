"""Text memories that are compared with latent memory: what earlier tasks taught, kept as text and read before a task.

Start reading in `base.py` (the protocol), then `store.py` (the file). A method is a file and reads like its paper's algorithm.
Nothing here imports torch or transformers: the reasoner as a scribe is `memgen.generation.scribe`.
"""
