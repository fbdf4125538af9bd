"""Plain feed-forward nets: read off the module at each call, and differentiated by the fewest calls of torch."""
