"""The embedded default: a tiny tokenizer, a tiny reasoner and generated tasks that run on two CPU cores in minutes."""
