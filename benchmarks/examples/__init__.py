"""Small experiments, each of which explains one thing."""
