"""The Python API: an agent that is loaded by name, answers, and is saved, published and described."""
