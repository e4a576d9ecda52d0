"""Training: models that are made for streams, from nothing but a folder of text."""
