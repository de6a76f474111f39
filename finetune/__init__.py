"""Fine-tune open language models on one GPU, from a YAML file to a model that runs anywhere."""

__version__ = "0.1.0"
