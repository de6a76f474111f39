"""Everything that only a GPU can show: `pack.py` gathers what a bare machine lacks, `run.py` measures there."""
