"""`phi3v bench`: what a training step costs on this machine, at the published size with random weights."""
