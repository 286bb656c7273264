"""What `specdec bench` measures with: prompts, methods, the harness and its report."""
