"""Whether numbers can be trusted: independence of samples, references in float64, comparisons, non-finite values."""
