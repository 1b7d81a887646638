"""mmcli: featurize image-text pairs once with a frozen encoder, then experiment in seconds."""

__version__ = "0.1.0"
