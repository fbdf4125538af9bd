"""jacray_workers: from a model, inputs and a request to blocks of Jacobian. Loads no Ray and no web framework."""
