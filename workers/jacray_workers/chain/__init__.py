"""What the method `chain` stands on: a tape of the model, where it can be cut, and the cheapest bracketing."""
