"""Studies and benchmarks of ltm_hf, which knows nothing of them. Run from the repository's root."""
