"""Encoders of images and texts: the protocol, the Hugging Face and offline backbones, and cutting their towers."""
