"""From a model, inputs and a request to one function of flat lists of tensors."""
