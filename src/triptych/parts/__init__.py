"""The panels and hinges: vision encoders, connectors, language models and their layers."""
