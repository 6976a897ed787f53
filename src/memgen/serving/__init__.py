"""An agent behind an OpenAI-compatible HTTP server, with a batch that requests join and leave."""
