"""Who runs the model at inference. `native` is this project's own; others keep its interface."""
