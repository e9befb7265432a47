"""A model's answer spoken: talker, code predictor and the codec's decoder, beside the engine of the text."""
