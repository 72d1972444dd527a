"""From checked arguments to loss and gradients: the chunk loop and what it stands on."""
