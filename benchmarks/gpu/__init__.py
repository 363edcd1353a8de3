"""Parts of ``benchmarks/gpu_decode.py``; nothing here imports triton before that has settled whether it interprets."""
