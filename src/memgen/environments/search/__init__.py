"""Questions answered with a search engine."""
