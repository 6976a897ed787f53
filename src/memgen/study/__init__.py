"""Memories beside each other: every method on every task, with one template and one budget, item by item (`memgen study`)."""
