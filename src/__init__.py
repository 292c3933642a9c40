"""modelharbor: a GraphQL API server that manages AI models."""

from importlib.metadata import version

__version__ = version("modelharbor")
