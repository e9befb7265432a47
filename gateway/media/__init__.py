"""Images and sound that users send: bounded before they are decoded, then of the size and rate that the model takes."""
