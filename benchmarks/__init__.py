"""What is measured side by side, on nets that anyone can build."""
