"""What ``nanovllm-bento bench`` runs. A benchmark is a command with a JSON result that says where it was measured."""
