"""What needs a CUDA device: `make test-gpu`. Elsewhere each test says that it was skipped."""
