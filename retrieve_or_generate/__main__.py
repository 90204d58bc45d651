"""`python -m retrieve_or_generate` is `rog`: what torchrun starts, which takes a module (`finetune/processes.py`)."""

from retrieve_or_generate.cli import main

if __name__ == "__main__":
    main()
