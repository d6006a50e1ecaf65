"""`python -m fedllm` is the `fedllm` command."""

from fedllm.cli import main

main()
