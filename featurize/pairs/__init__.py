"""Pairs on disk: folders and manifests, text, images, digests."""
