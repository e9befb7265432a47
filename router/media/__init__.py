"""Images and sound on their way into a prompt: what stands for them, and what the model is given in its place."""
