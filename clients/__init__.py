"""The sites' side: the ClientApp, local training, the witness, models and sources of images."""
