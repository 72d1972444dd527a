"""From checked arguments to loss and gradients; `loop` is the chunk loop."""
