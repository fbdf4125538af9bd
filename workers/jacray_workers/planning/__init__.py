"""Which method, in what portions, within what memory: decided before anything is computed."""
