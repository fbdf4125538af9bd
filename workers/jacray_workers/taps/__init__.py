"""What the method `layerwise` stands on: which calls of a model meet a parameter, and what they do with the batch."""
