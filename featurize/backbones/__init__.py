"""Encoders of images and texts: the protocol, Hugging Face and offline backbones, towers cut below the last layers."""
