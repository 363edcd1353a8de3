"""Triton kernels for decode on a GPU, and their twins; nothing here imports triton before it is used."""
