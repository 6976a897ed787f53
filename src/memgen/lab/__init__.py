"""The embedded default: a tiny tokenizer, reasoner and generated tasks that train on two CPU cores in minutes."""
