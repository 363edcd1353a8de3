"""Layers as PyTorch modules: those of latent attention, and the source's own, loaded and run one at a time."""
